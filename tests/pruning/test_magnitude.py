# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from peft_spp import SPPConfig
from peft_spp.pruning import prune_magnitude
from peft_spp.pruning.layers import find_target_layers, weight_matrix

from helpers.every_model import build


def test_sparsity_compares_within_the_layer(llama: LlamaForCausalLM) -> None:
    dense = copy.deepcopy(llama)
    prune_magnitude(llama, sparsity=0.3)
    for name, layer in find_target_layers(llama, None).items():
        before = dense.get_submodule(name).weight
        kept = layer.weight != 0
        assert int((~kept).sum()) == round(0.3 * before.numel())
        assert before[~kept].abs().max() <= before[kept].abs().min()
        assert torch.equal(layer.weight[kept], before[kept])


@pytest.mark.parametrize("model_name", ["llama", "gpt2"])
def test_pattern_runs_along_the_input(model_name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(model_name)
    dense = copy.deepcopy(model)
    prune_magnitude(model, pattern="2:4")
    layers = find_target_layers(model, None)
    assert len(layers) == {"llama": 14, "gpt2": 8}[model_name]
    for name, layer in layers.items():
        groups = weight_matrix(layer).reshape(-1, 4)
        assert (groups.count_nonzero(dim=1) == 2).all()
        before = weight_matrix(dense.get_submodule(name)).reshape(-1, 4).abs()
        assert torch.equal(groups.abs().sum(dim=1), before.topk(2).values.sum(dim=1))


def test_pruned_places_are_positive_zero(llama: LlamaForCausalLM) -> None:
    prune_magnitude(llama, pattern="2:4")
    for layer in find_target_layers(llama, None).values():
        assert not layer.weight[layer.weight == 0].signbit().any()


def test_head_and_embeddings_stay_dense(gpt2: GPT2LMHeadModel, llama: LlamaForCausalLM) -> None:
    for model in (gpt2, llama):
        prune_magnitude(model, sparsity=0.5)
        assert (model.get_output_embeddings().weight != 0).all()
        assert (model.get_input_embeddings().weight != 0).all()


def test_bfloat16(llama: LlamaForCausalLM) -> None:
    prune_magnitude(llama.to(torch.bfloat16), sparsity=0.5)
    for layer in find_target_layers(llama, None).values():
        assert layer.weight.dtype == torch.bfloat16
        assert int((layer.weight == 0).sum()) == layer.weight.numel() // 2


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (r".*\.mlp\.\w+", ["down_proj", "gate_proj", "up_proj"]),
        (["lm_head"], ["lm_head"]),
    ],
)
def test_target_modules(llama: LlamaForCausalLM, target_modules: str | list[str], expected: list[str]) -> None:
    prune_magnitude(llama, pattern="2:4", target_modules=target_modules)
    sparse = {
        name.rsplit(".")[-1]
        for name, module in llama.named_modules()
        if isinstance(module, nn.Linear) and (module.weight == 0).any()
    }
    assert sorted(sparse) == expected


def test_a_suffix_is_whole_names_only() -> None:
    model = nn.ModuleDict({"proj": nn.Linear(4, 4), "q_proj": nn.Linear(4, 4)})
    assert list(find_target_layers(model, ["proj"])) == ["proj"]


def test_stacked_experts_are_warned_about() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(4, 2)
            self.up = nn.Parameter(torch.rand(2, 4, 4))

    model = nn.Sequential(nn.ModuleList([Experts()]))
    with pytest.warns(UserWarning, match=r"1 weights in the blocks, such as 0\.0\.up, .* stay dense"):
        prune_magnitude(model, sparsity=0.5)


def make_indivisible(model: LlamaForCausalLM) -> None:
    model.model.layers[1].mlp.down_proj = nn.Linear(22, 16)


def make_nan(model: LlamaForCausalLM) -> None:
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")


def make_quantized(model: LlamaForCausalLM) -> None:
    layer = model.model.layers[1].mlp.down_proj
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)


@pytest.mark.parametrize(
    ("break_model", "message"),
    [
        (make_indivisible, r"22 input features of model\.layers\.1\.mlp\.down_proj are not divisible"),
        (make_nan, r"model\.layers\.1\.mlp\.down_proj contains NaN or infinite values"),
        (make_quantized, r"prune before quantizing"),
    ],
)
def test_errors_come_before_the_model_is_changed(llama: LlamaForCausalLM, break_model, message: str) -> None:
    break_model(llama)
    before = copy.deepcopy(llama.state_dict())
    with pytest.raises(ValueError, match=message):
        prune_magnitude(llama, pattern="2:4")
    for name, value in llama.state_dict().items():
        assert torch.equal(value, before[name]) or value.isnan().any()


def test_no_match(llama: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="No linear layer of the model matches"):
        prune_magnitude(llama, pattern="2:4", target_modules=["qkv"])


def test_no_blocks() -> None:
    with pytest.raises(ValueError, match="no transformer blocks"):
        prune_magnitude(nn.Sequential(nn.Linear(4, 4)), pattern="2:4")


def test_a_model_with_an_adapter_is_refused(llama: LlamaForCausalLM) -> None:
    peft_model = get_peft_model(llama, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="before the adapter is added"):
        prune_magnitude(peft_model, pattern="2:4")


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (LoraConfig(target_modules=["q_proj"]), r"layers\.0\.self_attn\.q_proj"),
        (SPPConfig(target_modules=["v_proj"]), r"layers\.0\.self_attn\.v_proj"),
        (LoraConfig(target_modules=["down_proj"], modules_to_save=["up_proj"]), r"layers\.0\.mlp\.up_proj"),
    ],
)
def test_the_body_of_a_model_with_an_adapter_is_refused_unchanged(
    llama: LlamaForCausalLM, config: PeftConfig, named: str
) -> None:
    peft_model = get_peft_model(llama, config)
    before = copy.deepcopy(peft_model.state_dict())
    with pytest.raises(ValueError, match=rf"has a PEFT adapter \({named}\)\. Prune the base model before"):
        prune_magnitude(peft_model.get_base_model().model, sparsity=0.5)
    assert all(torch.equal(value, before[name]) for name, value in peft_model.state_dict().items())


def test_a_model_is_pruned_once_its_adapter_is_merged(llama: LlamaForCausalLM) -> None:
    merged = get_peft_model(
        llama, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    ).merge_and_unload()
    prune_magnitude(merged, pattern="2:4")
    assert all(
        (layer.weight.reshape(-1, 4) != 0).sum(-1).le(2).all() for layer in find_target_layers(merged, None).values()
    )


@pytest.mark.parametrize(
    ("model_type", "blocks"),
    [
        ("git", "git.encoder.layer."),
        ("kyutai_speech_to_text", "model.layers."),
        ("phi4_multimodal", "model.layers."),
    ],
)
def test_the_larger_encoder_of_a_multimodal_model_stays_dense(model_type: str, blocks: str) -> None:
    model = build(model_type)
    expected = {
        name for name, layer in model.named_modules() if name.startswith(blocks) and isinstance(layer, nn.Linear)
    }
    assert set(find_target_layers(model, None)) == expected
