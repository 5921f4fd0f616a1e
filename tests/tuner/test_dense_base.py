# SPDX-License-Identifier: Apache-2.0
"""A base model without zeros is warned of when a new adapter is made, with the layers to leave out."""

import ast
import copy
import re
import warnings

import torch
from peft import PeftModel, get_peft_model

from peft_spp import SPPConfig

from helpers.tiny import masked_llama, prune_, tiny_llama
from helpers.unchanged import refused


def dense_warnings(caught):
    return [str(one.message) for one in caught if "has nothing to preserve" in str(one.message)]


def test_a_dense_base_is_warned_of_once(recwarn):
    model = get_peft_model(tiny_llama(), SPPConfig(r=4))
    layers = sum(name.endswith("spp_A") for name, _ in model.named_modules())
    (message,) = dense_warnings(recwarn)
    assert message.startswith(f"None of the {layers} adapted layers holds a zero") and "peft-spp prune" in message


def test_layers_without_zeros_are_named_with_what_leaves_them_out(recwarn):
    base = tiny_llama()
    for name, weight in base.named_parameters():
        if "mlp" in name:
            prune_(weight, "2:4")
    copied = copy.deepcopy(base)
    get_peft_model(base, SPPConfig(r=4))
    (message,) = dense_warnings(recwarn)
    attention, layers = len(base.model.layers) * 4, len(base.model.layers) * 7
    assert message.startswith(f"{attention} of {layers} adapted layers hold no zeros")
    assert "model.layers.0.self_attn.q_proj" in message and "mlp" not in message
    excluded = ast.literal_eval(re.search(r"`exclude_modules=(.*)`", message)[1])
    recwarn.clear()
    adapted = get_peft_model(copied, SPPConfig(r=4, exclude_modules=excluded))
    assert sum(name.endswith("spp_A") for name, _ in adapted.named_modules()) == layers - attention
    assert not dense_warnings(recwarn)


def test_parameters_without_zeros_are_taken_out_of_the_targets(recwarn):
    get_peft_model(masked_llama(), SPPConfig(r=4, target_parameters=["embed_tokens.weight"]))
    (message,) = dense_warnings(recwarn)
    assert message.startswith("1 adapted parameters hold no zeros") and "`exclude_modules=" not in message
    assert "model.embed_tokens.weight" in message and "take them out of `target_parameters`" in message


def test_names_that_sparse_layers_share_are_told_apart_or_left_to_the_user(recwarn):
    base = masked_llama()
    torch.nn.init.ones_(base.model.layers[1].mlp.up_proj.weight)
    get_peft_model(base, SPPConfig(r=4))
    (message,) = dense_warnings(recwarn)
    assert message.startswith("1 of ") and "`exclude_modules=['1.mlp.up_proj']`" in message


def test_what_cannot_be_seen_is_not_called_dense(recwarn, tmp_path):
    with torch.device("meta"):
        get_peft_model(tiny_llama(), SPPConfig(r=4))
    assert not dense_warnings(recwarn)
    # nor is a base model when an adapter is loaded: its record is compared with the masks
    get_peft_model(tiny_llama(), SPPConfig(r=4)).save_pretrained(tmp_path)
    recwarn.clear()
    PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert not dense_warnings(recwarn)


def test_a_warning_that_is_an_error_leaves_the_model_as_it_was():
    base = tiny_llama()
    with warnings.catch_warnings(), refused(base, "None of the", UserWarning):
        warnings.filterwarnings("error", message=".*has nothing to preserve")
        get_peft_model(base, SPPConfig(r=4))
