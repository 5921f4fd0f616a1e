# SPDX-License-Identifier: Apache-2.0
import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from peft_spp.pruning import prune_wanda
from peft_spp.pruning.input_statistics import InputNorms
from peft_spp.pruning.layers import find_blocks, find_target_layers, weight_matrix


def reference_mask(weight: torch.Tensor, inputs: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """The paper's equation in float64, group by group: the N weights of each M with the highest |W_ij|·‖X_j‖₂."""
    scores = weight.double().abs() * inputs.double().reshape(-1, inputs.shape[-1]).norm(dim=0)
    kept = scores.reshape(-1, m).argsort(dim=1)[:, m - n :]
    return torch.zeros_like(scores.reshape(-1, m), dtype=torch.bool).scatter_(1, kept, True).reshape(scores.shape)


def layer_inputs(model: PreTrainedModel, name: str, batches: list[Any]) -> torch.Tensor:
    """What really enters a layer when the whole model is run."""
    inputs: list[torch.Tensor] = []
    with model.get_submodule(name).register_forward_pre_hook(lambda module, args: inputs.append(args[0])):
        with torch.no_grad():
            for batch in batches:
                model.eval()(batch)
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs])


@pytest.mark.parametrize("model_name", ["llama", "gpt2"])
def test_block_by_block_matches_the_equation(
    model_name: str, request: pytest.FixtureRequest, calibration_batches: list[torch.Tensor]
) -> None:
    """
    Each block's mask is that of the equation, on the inputs that the block gets once the blocks before it are pruned.
    """
    model = request.getfixturevalue(model_name)
    reference = copy.deepcopy(model)
    prune_wanda(model, calibration_batches, pattern="2:4")

    blocks_name, blocks = find_blocks(model)
    for index in range(len(blocks)):
        layers = find_target_layers(model, rf"{blocks_name}\.{index}\..*")
        for name, layer in layers.items():
            dense = weight_matrix(reference.get_submodule(name)).detach()
            mask = reference_mask(dense, layer_inputs(reference, name, calibration_batches), 2, 4)
            assert torch.equal(weight_matrix(layer), dense * mask), name
        for name, layer in layers.items():
            reference.get_submodule(name).load_state_dict(layer.state_dict())


def test_sparsity_compares_within_each_output(
    llama: LlamaForCausalLM, calibration_batches: list[torch.Tensor]
) -> None:
    dense = copy.deepcopy(llama)
    prune_wanda(llama, calibration_batches, sparsity=0.3)
    name = "model.layers.0.self_attn.q_proj"
    layer, weight = llama.get_submodule(name), dense.get_submodule(name).weight
    norms = layer_inputs(dense, name, calibration_batches).double().norm(dim=0)
    scores = weight.double().abs() * norms
    for row in range(weight.shape[0]):
        kept = layer.weight[row] != 0
        assert int((~kept).sum()) == round(0.3 * weight.shape[1])
        assert scores[row][~kept].max() < scores[row][kept].min()
    for other in find_target_layers(llama, None).values():
        assert ((other.weight == 0).sum(dim=1) == round(0.3 * other.in_features)).all()
        assert not other.weight[other.weight == 0].signbit().any()


def test_activations_matter(llama: LlamaForCausalLM, calibration_batches: list[torch.Tensor]) -> None:
    """A feature with large activations keeps even its small weights, which magnitude pruning would prune."""
    norm = llama.model.layers[0].input_layernorm
    norm.weight.data[3] = 1e6
    llama.model.layers[0].self_attn.q_proj.weight.data[:, 3] *= 1e-2
    prune_wanda(llama, calibration_batches, pattern="2:4")
    assert (llama.model.layers[0].self_attn.q_proj.weight[:, 3] != 0).all()


def test_norms_add_up_over_batches_in_float32() -> None:
    layer = nn.Linear(3, 2, dtype=torch.bfloat16)
    batches = [torch.randn(4, 5, 3, dtype=torch.bfloat16) * 300 for _ in range(4)]
    norms = InputNorms({"layer": layer})
    with norms:
        for batch in batches:
            layer(batch)
    layer(batches[0])  # no longer observed
    expected = torch.cat(batches).double().reshape(-1, 3).norm(dim=0)
    result = norms.compute()["layer"]
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=0)


def test_padding_does_not_count(llama: LlamaForCausalLM) -> None:
    tokens = torch.randint(0, 32, (1, 8))
    padded = torch.cat([tokens, torch.full((1, 24), 5)], dim=1)
    attention_mask = torch.tensor([[1] * 8 + [0] * 24])
    other = copy.deepcopy(llama)
    prune_wanda(llama, [tokens], pattern="2:4")
    prune_wanda(other, [{"input_ids": padded, "attention_mask": attention_mask}], pattern="2:4")
    for name, value in llama.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_conv1d_head_and_embeddings_stay_dense(gpt2: GPT2LMHeadModel, calibration_batches: list[torch.Tensor]) -> None:
    prune_wanda(gpt2, calibration_batches, sparsity=0.5)
    attention = gpt2.transformer.h[0].attn.c_attn
    assert attention.weight.shape == (16, 48)  # stored (in, out): each column is an output
    assert ((attention.weight == 0).sum(dim=0) == 8).all()
    assert (gpt2.transformer.wte.weight != 0).all()


def test_target_modules(llama: LlamaForCausalLM, calibration_batches: list[torch.Tensor]) -> None:
    prune_wanda(llama, calibration_batches, pattern="2:4", target_modules=["o_proj"])
    for name, layer in find_target_layers(llama, None).items():
        assert (layer.weight == 0).any() == name.endswith("o_proj")


def test_model_state_is_restored(llama: LlamaForCausalLM, calibration_batches: list[torch.Tensor]) -> None:
    llama.train()
    llama.model.norm.eval()
    prune_wanda(llama, iter(calibration_batches), pattern="2:4")
    assert llama.training and llama.model.layers[0].training and not llama.model.norm.training
    assert llama.config.use_cache
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llama.modules())
    assert all(parameter.requires_grad for parameter in llama.parameters())


def with_infinite_activations(model: LlamaForCausalLM) -> None:
    model.model.layers[1].input_layernorm.weight.data[0] = float("inf")


def with_skipped_block(model: LlamaForCausalLM) -> None:
    model.config.num_hidden_layers = 1


def with_change_between_blocks(model: LlamaForCausalLM) -> None:
    block = model.model.layers[1]
    block.register_forward_pre_hook(lambda module, args: (args[0] + 1, *args[1:]), prepend=True)


@pytest.mark.parametrize(
    ("break_model", "message"),
    [
        (with_infinite_activations, r"inputs of model\.layers\.1\.self_attn\.q_proj are not finite"),
        (with_skipped_block, "does not run each of its blocks once"),
        (with_change_between_blocks, "changes the hidden states between its blocks"),
    ],
)
def test_errors_come_before_the_model_is_changed(
    llama: LlamaForCausalLM, calibration_batches: list[torch.Tensor], break_model, message: str
) -> None:
    break_model(llama)
    before = copy.deepcopy(llama.state_dict())
    with pytest.raises(ValueError, match=message):
        prune_wanda(llama, calibration_batches, pattern="2:4")
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())


def test_no_calibration_data(llama: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="no calibration data"):
        prune_wanda(llama, [], pattern="2:4")


def test_only_blocks_are_pruned(llama: LlamaForCausalLM, calibration_batches: list[torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="lm_head is outside the transformer blocks"):
        prune_wanda(llama, calibration_batches, pattern="2:4", target_modules=["lm_head"])


def test_encoder_decoder_models_are_refused() -> None:
    config = T5Config(vocab_size=8, d_model=4, d_kv=2, d_ff=4, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match=r"encoder-decoder.*Only magnitude"):
        prune_wanda(T5ForConditionalGeneration(config), [torch.zeros(1, 2, dtype=torch.long)], pattern="2:4")
