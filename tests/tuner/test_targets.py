# SPDX-License-Identifier: Apache-2.0
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper

from peft_spp import SPPConfig
from peft_spp.tuner.targets import transformer_block_linear_targets

from helpers.tiny import LLAMA, tiny, tiny_llama


ENCODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
VIT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}


def adapted(model) -> set[str]:
    return {
        name.removeprefix("base_model.model.") for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)
    }


@pytest.mark.parametrize(
    ("class_name", "settings", "expected"),
    [
        (
            "LlamaForCausalLM",
            LLAMA,
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        ),
        ("GPT2LMHeadModel", GPT2, {"c_attn", "c_proj", "c_fc"}),
        ("T5ForConditionalGeneration", T5, {"q", "k", "v", "o", "wi", "wo"}),
        (
            "OPTForCausalLM",
            {**ENCODER, "ffn_dim": 48, "word_embed_proj_dim": 32},
            {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
        ),
        # "dense" alone would also be the pooler's and the classification head's
        ("BertModel", ENCODER, {"query", "key", "value", "output.dense", "intermediate.dense"}),
        ("RobertaForSequenceClassification", ENCODER, {"query", "key", "value", "output.dense", "intermediate.dense"}),
    ],
)
def test_default_targets(class_name, settings, expected):
    assert transformer_block_linear_targets(tiny(class_name, **settings)) == expected


@pytest.mark.parametrize(
    ("class_name", "settings", "block_list"),
    [
        ("LlamaForSequenceClassification", {**LLAMA, "pad_token_id": 0}, "model.layers."),
        ("BertForSequenceClassification", ENCODER, "bert.encoder.layer."),
        ("ViTForImageClassification", VIT, "layer"),
        ("MixtralForCausalLM", {**LLAMA, "num_local_experts": 4}, "model.layers."),
    ],
)
def test_only_linear_layers_inside_the_blocks_are_adapted(class_name, settings, block_list):
    model = get_peft_model(tiny(class_name, **settings), SPPConfig(r=4))
    names = adapted(model)
    assert names
    assert all(block_list in name for name in names)


def test_a_router_that_returns_its_choice_is_not_adapted():
    # a linear layer by its class, but not by what it returns
    settings = {**LLAMA, "intermediate_size_mlp": 48, "num_local_experts": 4, "head_dim": 8}
    model = get_peft_model(tiny("Llama4ForCausalLM", **settings), SPPConfig(r=4, target_parameters=[]))
    names = adapted(model)
    assert any("shared_expert" in name for name in names) and not any("router" in name for name in names)
    assert model(input_ids=torch.arange(4).view(1, 4)).logits.isfinite().all()


def test_layers_to_transform_works_with_the_default_targets():
    for layers in (0, [0, 2], []):
        model = get_peft_model(tiny_llama(), SPPConfig(layers_to_transform=layers))
        indices = {int(name.split(".")[2]) for name in adapted(model)}
        assert indices == ({0, 1, 2} if layers == [] else {0} if layers == 0 else set(layers))


def test_a_head_that_peft_saves_whole_is_not_adapted():
    model = get_peft_model(tiny("RobertaForSequenceClassification", **ENCODER), SPPConfig(task_type="SEQ_CLS"))
    assert not any("classifier" in name for name in adapted(model))
    assert any("classifier.modules_to_save" in name for name, p in model.named_parameters() if p.requires_grad)


def test_a_second_adapter_finds_the_same_targets():
    model = get_peft_model(tiny_llama(), SPPConfig())
    before = adapted(model)
    model.add_adapter("second", SPPConfig(r=4))
    assert adapted(model) == before
    assert model.peft_config["second"].target_modules == model.peft_config["default"].target_modules


def test_a_second_all_linear_adapter_finds_the_same_targets():
    model = get_peft_model(tiny_llama(), SPPConfig(target_modules="all-linear"))
    model.add_adapter("second", SPPConfig(r=4, target_modules="all-linear"))
    assert model.peft_config["second"].target_modules == model.peft_config["default"].target_modules


def test_exclude_modules():
    model = get_peft_model(tiny_llama(), SPPConfig(exclude_modules=["down_proj"]))
    assert adapted(model) and not any("down_proj" in name for name in adapted(model))


def test_a_layer_that_shares_its_inner_name_with_one_outside_is_named_in_full():
    from torch import nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(4, 4)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Block(), Block()])
            self.proj = nn.Linear(4, 4)

    assert transformer_block_linear_targets(Model()) == {"layers.0.proj", "layers.1.proj"}
    assert transformer_block_linear_targets(Model(), layers_to_transform=1) == {"layers.1.proj"}
    assert adapted(get_peft_model(Model(), SPPConfig(r=2, layers_to_transform=1))) == {"layers.1.proj"}


def test_a_target_that_no_module_is_called_by_is_named_among_others(tmp_path):
    message = r"no module of LlamaForCausalLM is called 'self_attn\.v_porj', 'up_porj'"
    names = ["q_proj", "self_attn.v_porj", "model.layers.1.mlp.down_proj", "up_porj"]
    with pytest.warns(UserWarning, match=message):
        model = get_peft_model(tiny_llama(), SPPConfig(r=4, target_modules=names))
    assert {name.rpartition(".")[2] for name in adapted(model)} == {"q_proj", "down_proj"}
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="target_modules")
        PeftModel.from_pretrained(tiny_llama(), tmp_path)
        # adapted already, left out by other settings, or not named one by one
        model.add_adapter("second", SPPConfig(r=4, target_modules=["q_proj"]))
        settings = {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"], "layers_to_transform": [0]}
        model.add_adapter("third", SPPConfig(r=4, **settings))
        for targets in (None, "all-linear", r".*\.q_proj|nothing"):
            get_peft_model(tiny_llama(), SPPConfig(r=4, target_modules=targets))


def test_a_module_to_save_that_is_not_there_is_named():
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["head", "embed_tokenz"]}
    with pytest.warns(UserWarning, match=r"modules_to_save: no module of LlamaForCausalLM is called 'embed_tokenz'"):
        model = get_peft_model(tiny_llama(), SPPConfig(r=4, **settings))
    assert isinstance(model.base_model.model.lm_head, ModulesToSaveWrapper)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="modules_to_save")
        model.add_adapter("second", SPPConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
        # PEFT names several heads, of which the model has one
        classifier = tiny("LlamaForSequenceClassification", **LLAMA)
        get_peft_model(classifier, SPPConfig(r=4, task_type="SEQ_CLS"))
