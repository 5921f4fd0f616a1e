# SPDX-License-Identifier: Apache-2.0
"""Which modules a report counts, and in which layout it reads them."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from peft import PromptTuningConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import GptOssConfig, LlamaConfig, MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D as TransformersConv1D

from peft_spp.checkpoints.layout import (
    CONV1D_MODEL_TYPES,
    CONV1D_NAMES,
    TRANSPOSED_EXPERTS_MODEL_TYPES,
    model_types,
)
from peft_spp.sparsity import sparsity_report

from helpers.sparsity_tiny_models import half, keep_n_m, tiny_llama


@pytest.mark.parametrize("kind", ["module", "state dict", "file", "folder", "shards"])
def test_conv1d_is_read_along_its_inputs(gpt2, tmp_path, kind):
    expected = sparsity_report(gpt2)
    if kind == "module":
        report = expected
    elif kind == "state dict":
        report = sparsity_report(gpt2.state_dict())
    else:
        gpt2.save_pretrained(tmp_path, max_shard_size="20KB" if kind == "shards" else "1GB")
        report = sparsity_report(tmp_path / "model.safetensors" if kind == "file" else tmp_path)
    assert dict(report.modules) == dict(expected.modules)
    assert len(report) == 8
    assert {module.pattern for module in report} == {"2:4"}
    assert report.all_satisfy("2:4")
    attention = report["transformer.h.0.attn.c_attn"]
    assert (attention.shape, attention.in_features, attention.out_features) == ((32, 96), 32, 96)


def test_without_any_hint_the_layout_can_be_given(gpt2):
    bare = {name: tensor for name, tensor in gpt2.state_dict().items() if name.endswith("weight")}
    assert not sparsity_report(bare).all_satisfy("2:4")
    for conv1d in (True, r".*\.c_\w+", ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]):
        assert sparsity_report(bare, conv1d=conv1d).all_satisfy("2:4")


def test_names_of_conv1d_do_not_decide_where_biases_say_otherwise(tmp_path):
    """GPTBigCode calls its nn.Linear layers c_attn and c_proj as well."""
    weight = keep_n_m(torch.randn(24, 16), 2, 4)
    state = {"h.0.attn.c_attn.weight": weight, "h.0.attn.c_attn.bias": torch.zeros(24)}
    assert sparsity_report(state).all_satisfy("2:4")
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_bigcode"}))
    assert sparsity_report(tmp_path).all_satisfy("2:4")
    (tmp_path / "config.json").write_text(json.dumps({"decoder": {"model_type": "gpt2"}}))
    assert not sparsity_report(tmp_path).all_satisfy("2:4")
    assert sparsity_report(tmp_path, conv1d=False).all_satisfy("2:4")


def test_biases_that_contradict_each_other_tell_nothing():
    weight = keep_n_m(torch.randn(24, 16), 2, 4)
    straight = {"a.fc.weight": weight, "a.fc.bias": torch.zeros(24)}
    transposed = {"b.fc.weight": weight, "b.fc.bias": torch.zeros(16)}
    assert sparsity_report(transposed)["b.fc"].transposed
    assert not any(module.transposed for module in sparsity_report(straight | transposed))


def test_the_model_types_of_a_model_and_of_its_parts_are_known():
    parts = {"vision": {"model_type": "vit"}, "text": {"model_type": "llama4_text", "more": {"model_type": "gpt2"}}}
    assert model_types({"model_type": "llama4", **parts}) == {"llama4", "vit", "llama4_text", "gpt2"}
    assert model_types({"model_type": 3, "a": [1]}) == frozenset()


def test_the_model_types_that_use_conv1d_are_those_of_transformers():
    users, names = set(), set()
    for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        text = file.read_text(encoding="utf-8")
        types = set()
        for config in file.parent.glob("configuration_*.py"):
            types |= set(re.findall(r'^\s+model_type\s*(?::[^=]+)?= "([\w-]+)"', config.read_text("utf-8"), re.M))
        if "is_transposed=True" in text:
            assert types & TRANSPOSED_EXPERTS_MODEL_TYPES, file
        made = re.findall(r"self\.(\w+) = Conv1D\(", text)
        if made:
            assert types & CONV1D_MODEL_TYPES, file
            users.add(file.parent.name)
            names.update(made)
    assert "gpt2" in users
    assert names <= CONV1D_NAMES


def test_adapters_do_not_count(llama):
    state = {f"base_model.model.{name}": tensor for name, tensor in llama.state_dict().items()}
    query = "base_model.model.model.layers.0.self_attn.q_proj"
    state[f"{query}.base_layer.weight"] = state.pop(f"{query}.weight")
    state[f"{query}.spp_A.default"] = torch.ones(8, 32)
    state[f"{query}.lora_B.default.weight"] = torch.ones(32, 8)
    state[f"{query}.anything_new.default.weight"] = torch.ones(32, 8)
    report = sparsity_report(state)
    assert dict(report.modules) == dict(sparsity_report(llama).modules)
    assert list(report.skipped.values()).count("adapter") == 3


def test_a_trained_copy_does_not_hide_the_pruned_original():
    state = {
        "base_model.model.fc.original_module.weight": keep_n_m(torch.randn(8, 8), 2, 4),
        "base_model.model.fc.modules_to_save.default.weight": torch.ones(8, 8),
    }
    report = sparsity_report(state)
    assert report.all_satisfy("2:4") and list(report.modules) == ["fc"]
    assert "adapter" in report.skipped.values()


def test_heads_and_embeddings_count_only_when_asked_for(llama):
    report = sparsity_report(llama.state_dict())
    assert report.skipped == {"model.embed_tokens": "embedding", "lm_head": "head"}
    for source in (llama, llama.state_dict()):
        assert list(sparsity_report(source, modules=["lm_head"]).modules) == ["lm_head"]
        chosen = sparsity_report(source, modules=r"model\.layers\.0\..*_proj")
        assert len(chosen) == 7
        assert len(sparsity_report(source, modules=["q_proj", "layers.1.mlp.up_proj"])) == 3


def test_fused_experts_are_read_expert_by_expert():
    out_in = torch.stack([keep_n_m(torch.randn(8, 16), 2, 4) for _ in range(3)])
    state = {"mlp.experts.gate_up_proj": out_in, "mlp.experts.gate_up_proj_scale": torch.ones(3, 8, 1)}
    report = sparsity_report(state)
    module = report["mlp.experts.gate_up_proj"]
    assert len(report) == 1 and list(report.skipped) == ["mlp.experts.gate_up_proj_scale"]
    for name in ("input_linear", "output_linear"):
        assert list(sparsity_report({f"mlp.{name}.weight": out_in}).modules) == [f"mlp.{name}"]
    for name in ("input_linear", "experts", "other"):
        assert not sparsity_report({f"mlp.{name}.scales": out_in, "experts": out_in}).modules
    assert (module.pattern, module.shape, module.in_features, module.out_features) == ("2:4", (3, 8, 16), 16, 8)
    swapped = {"mlp.experts.gate_up_proj": out_in.transpose(1, 2).contiguous()}
    assert sparsity_report(swapped)["mlp.experts.gate_up_proj"].pattern == "unstructured"
    assert sparsity_report(swapped, conv1d=["gate_up_proj"])["mlp.experts.gate_up_proj"].pattern == "2:4"


def test_a_mixture_of_experts_counts_its_experts_and_not_its_router():
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    model = MixtralForCausalLM(config)
    for source in (model, model.state_dict()):
        report = sparsity_report(source)
        assert sum("experts" in name for name in report.modules) >= 2
        assert "router" in report.skipped.values()
        assert sum(name.endswith("_proj") and "self_attn" in name for name in report.modules) == 4
    routers = [name for name, reason in report.skipped.items() if reason == "router"]
    assert list(sparsity_report(model.state_dict(), modules=routers).modules) == routers


class Experts(nn.Module):
    def __init__(self, is_transposed):
        super().__init__()
        if is_transposed is not None:
            self.is_transposed = is_transposed
        stored = torch.stack([half(4, 8) for _ in range(2)])
        self.down_proj = nn.Parameter(stored.transpose(1, 2).contiguous() if is_transposed is True else stored)
        self.flat = nn.Parameter(torch.ones(2, 2))


@pytest.mark.parametrize("is_transposed", [None, False, True, "yes"])
def test_experts_say_themselves_how_they_are_stored(is_transposed):
    report = sparsity_report(nn.ModuleDict({"experts": Experts(is_transposed)}))
    module = report["experts.down_proj"]
    assert module.transposed is (is_transposed is True) and module.pattern == "2:4"
    assert (module.in_features, module.out_features, module.numel) == (8, 4, 64)
    assert list(report.skipped) == ["experts.flat"]
    assert list(sparsity_report(Experts(is_transposed)).skipped) == ["down_proj", "flat"]


def test_the_configuration_of_a_model_says_how_its_experts_are_stored():
    model = nn.ModuleDict({"experts": Experts(None)})
    model["experts"].down_proj.data = model["experts"].down_proj.data.transpose(1, 2).contiguous()
    for config, transposed in ((GptOssConfig(), True), (LlamaConfig(), False), ({"model_type": "gpt_oss"}, False)):
        model.config = config
        assert sparsity_report(model)["experts.down_proj"].transposed is transposed


def test_a_conv1d_is_told_by_its_class_whatever_its_name():
    class Conv1D(nn.Linear):
        """Of the same name as transformers', and stored as linear layers are."""

    layer = TransformersConv1D(8, 8)  # square, so that its bias does not tell
    layer.weight.data = half(8, 8).T.contiguous()
    other = Conv1D(8, 8)
    other.weight.data = half(8, 8)
    report = sparsity_report(nn.ModuleDict({"proj": layer, "other": other}))
    assert [(one.transposed, one.pattern) for one in report] == [(True, "2:4"), (False, "2:4")]


def test_in_a_model_the_class_tells_what_is_a_linear_layer():
    report = sparsity_report(nn.ModuleDict({"fc": nn.Embedding(4, 8)}))
    assert not report.modules and list(report.skipped) == ["fc"]


def test_prompt_learning_is_seen_through():
    model = tiny_llama()
    expected = dict(sparsity_report(model).modules)
    wrapped = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    assert dict(sparsity_report(wrapped).modules) == expected


def test_wrapped_models_are_seen_through():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Sequential(nn.Linear(4, 2))})
    expected = dict(sparsity_report(model).modules)
    assert set(expected) == {"a", "b.0"}
    wrapped = nn.DataParallel(model)
    report = sparsity_report(wrapped)
    assert dict(report.modules) == expected and report.source == "DataParallel"
    assert dict(sparsity_report(torch.compile(wrapped)).modules) == expected


def test_a_layer_without_a_shape_yet_holds_no_data():
    with pytest.raises(ValueError, match="'lazy'"):
        sparsity_report(nn.ModuleDict({"lazy": nn.LazyLinear(4)}))
    report = sparsity_report(nn.ModuleDict({"fine": nn.Linear(4, 4), "other": nn.LazyConv2d(4, 3)}))
    assert list(report.modules) == ["fine"] and set(report.skipped) == {"other", "other.bias"}
