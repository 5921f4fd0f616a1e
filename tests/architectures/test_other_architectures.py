# SPDX-License-Identifier: Apache-2.0
"""Classifiers, encoder-decoder and vision models and Conv1D layers, from training to the merged model on disk."""

from dataclasses import dataclass

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_spp import SPPConfig
from peft_spp.sparsity import compare_sparsity, sparsity_report
from peft_spp.tuner.targets import is_linear

from helpers.tiny import LLAMA, is_positive_zero, prune_, tiny


IDS = torch.arange(2, 26).view(2, 12)
LABELS = torch.tensor([0, 2])


@dataclass(frozen=True)
class Case:
    class_name: str
    settings: dict
    task_type: str | None
    inputs: dict
    # layers that are adapted, and the head that is trained whole
    adapted: set
    head: str | None = None


CASES = {
    "llama-classifier": Case(
        "LlamaForSequenceClassification",
        {**LLAMA, "num_labels": 3, "pad_token_id": 0},
        "SEQ_CLS",
        {"input_ids": IDS, "labels": LABELS},
        {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        "score",
    ),
    "t5": Case(
        "T5ForConditionalGeneration",
        {
            "vocab_size": 64,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        "SEQ_2_SEQ_LM",
        {"input_ids": IDS, "labels": IDS},
        {"q", "k", "v", "o", "wi", "wo"},
    ),
    "bart": Case(
        "BartForConditionalGeneration",
        {
            "vocab_size": 64,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 64,
        },
        "SEQ_2_SEQ_LM",
        {"input_ids": IDS, "labels": IDS},
        {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    ),
    "vit": Case(
        "ViTForImageClassification",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 8,
            "num_labels": 3,
        },
        None,
        {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16).sin(), "labels": LABELS},
        {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"},
        "classifier",
    ),
    "gpt2": Case(
        "GPT2LMHeadModel",
        {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "CAUSAL_LM",
        {"input_ids": IDS, "labels": IDS},
        {"c_attn", "c_proj", "c_fc"},
    ),
}


def pruned(case: Case) -> nn.Module:
    """The tiny model, all linear layers of its blocks pruned to 2:4 along their inputs."""
    model = tiny(case.class_name, **case.settings)
    with torch.no_grad():
        for name, module in model.named_modules():
            if is_linear(module) and name.rpartition(".")[2] in case.adapted:
                module.weight.normal_(std=0.2)
                prune_(module.weight.t() if isinstance(module, Conv1D) else module.weight, "2:4")
    return model


def logits(model: nn.Module, case: Case) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**case.inputs).logits


@pytest.mark.parametrize("name", list(CASES))
def test_from_training_to_the_merged_model(name, tmp_path):
    case = CASES[name]
    base = pruned(case)
    before = logits(base, case)
    base.save_pretrained(tmp_path / "base")
    head = None if case.head is None else base.get_submodule(case.head).weight.detach().clone()
    # PEFT knows the heads of a SEQ_CLS model; those of others are named
    modules_to_save = [case.head] if case.head and case.task_type is None else None
    config = SPPConfig(r=5, task_type=case.task_type, modules_to_save=modules_to_save)
    model = get_peft_model(base, config).train()
    layers = {m.module_name: m for m in model.modules() if hasattr(m, "spp_A")}
    assert {key.rpartition(".")[2] for key in layers} == case.adapted
    masks = {key: layer.unmerged_weight() == 0 for key, layer in layers.items()}

    torch.manual_seed(0)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.03)
    losses = []
    for _ in range(5):
        losses.append(model(**case.inputs).loss)
        losses[-1].backward()
        assert all(p.grad is not None for key, p in model.named_parameters() if ".spp_" in key)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    trained = logits(model, case)
    assert not torch.allclose(trained, before)
    model.save_pretrained(tmp_path / "adapter")

    cls = getattr(transformers, case.class_name)
    loaded = PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(loaded, case), trained)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded, case), before)

    merged = loaded.merge_and_unload(safe_merge=True)
    assert torch.equal(logits(merged, case), trained)
    for key, mask in masks.items():
        module = merged.get_submodule(key)
        weight = module.weight.t() if isinstance(module, Conv1D) else module.weight
        assert mask.any() and is_positive_zero(weight[mask]).all()
    if case.head is not None:
        assert not torch.equal(merged.get_submodule(case.head).weight, head)

    merged.save_pretrained(tmp_path / "merged")
    again = cls.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again, case), trained)
    comparison = compare_sparsity(tmp_path / "base", tmp_path / "merged")
    assert comparison.kept and comparison.negative_zeros == 0
    # not from disk, where some layers have the names of older versions
    report = sparsity_report(again, patterns=("2:4",), modules=list(case.adapted))
    assert len(report) == len(layers) and report.all_satisfy("2:4")
    assert {module.transposed for module in report} == {name == "gpt2"}


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_generation_of_encoder_decoder_models(name):
    case = CASES[name]
    model = get_peft_model(pruned(case), SPPConfig(r=4, task_type=case.task_type, init_weights=False)).eval()
    settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    generated = model.generate(input_ids=IDS, **settings)
    assert torch.equal(model.merge_and_unload().generate(input_ids=IDS, **settings), generated)
