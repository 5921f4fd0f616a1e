# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from plain_wanda import seen_inputs, stack_of, weight_of, without_cache
from torch import nn
from transformers import LlamaForCausalLM

from peft_spp.pruning import prune_sparsegpt
from peft_spp.pruning.input_statistics import InputHessians
from peft_spp.pruning.layers import find_blocks, find_target_layers, weight_matrix
from peft_spp.pruning.mask import pruning_mask
from peft_spp.pruning.sparsegpt import SparseGPT, sparsegpt_weight
from peft_spp.sparsity import satisfies_n_m

from helpers.every_model import build
from helpers.tiny import is_positive_zero


REQUESTS = [{"pattern": "2:4"}, {"pattern": "1:4"}, {"pattern": "4:8"}, {"sparsity": 0.5}, {"sparsity": 0.75}]


def correlated_inputs(tokens: int, features: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Inputs of which each depends on those before it, as activations do."""
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(features, features, generator=generator, dtype=dtype).triu() / 2
    scale = torch.rand(features, generator=generator, dtype=dtype) + 0.1
    return torch.randn(tokens, features, generator=generator, dtype=dtype) @ (mixing + torch.eye(features)) * scale


def reference(
    weight: torch.Tensor,
    inputs: torch.Tensor,
    *,
    pattern: str | None = None,
    sparsity: float | None = None,
    damping: float = 0.01,
    block_size: int = 128,
) -> torch.Tensor:
    """
    The paper's equations in float64, with no Cholesky factor and no lazy update: for each input, the inverse of the
    Hessian of the inputs that are left, and the surgeon's update of all weights that are left.
    """
    W, X = weight.double().clone(), inputs.double().reshape(-1, weight.shape[1])
    H = 2 * X.T @ X
    dead = H.diagonal() == 0
    W[:, dead] = 0
    H[dead, dead] = 1
    H = H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    inverses = [torch.linalg.inv(H[j:, j:]) for j in range(len(H))]
    diagonal = torch.stack([inverse[0, 0] for inverse in inverses])
    pruned = torch.zeros_like(W, dtype=torch.bool)
    for j in range(W.shape[1]):
        if pattern is not None:
            n, m = map(int, pattern.split(":"))
            if j % m == 0:
                scores = W[:, j : j + m] ** 2 / diagonal[j : j + m]
                lowest = scores.argsort(dim=1)[:, : m - n] + j
                pruned.scatter_(1, lowest, True)
        elif j % block_size == 0:
            scores = W[:, j : j + block_size] ** 2 / diagonal[j : j + block_size]
            lowest = scores.flatten().argsort()[: round(sparsity * scores.numel())]
            pruned[:, j : j + block_size].view_as(scores)[lowest // scores.shape[1], lowest % scores.shape[1]] = True
        change = torch.where(pruned[:, j], W[:, j] / diagonal[j], 0.0)
        W[:, j:] -= change[:, None] * inverses[j][0]
    return W.masked_fill(pruned, 0.0)


@pytest.mark.parametrize("request_", REQUESTS, ids=str)
@pytest.mark.parametrize("block_size", [8, 16, 128])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_layer_agrees_with_the_equations(request_: dict, block_size: int, dtype: torch.dtype) -> None:
    X = correlated_inputs(200, 40).to(dtype)
    W = torch.randn(12, 40, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(dtype)
    result = sparsegpt_weight(W, 2 * X.T @ X, block_size=block_size, **request_)
    expected = reference(W, X, block_size=block_size, **request_)
    assert result.dtype == dtype
    assert torch.equal(result == 0, expected == 0)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)


def test_the_request_is_met_exactly_with_positive_zeros() -> None:
    X = correlated_inputs(64, 24, torch.float32)
    W = -torch.rand(10, 24)
    for pattern in ("2:4", "1:4", "4:8", "2:3"):
        result = sparsegpt_weight(W, 2 * X.T @ X, pattern=pattern, block_size=24)
        n, m = map(int, pattern.split(":"))
        assert satisfies_n_m(result, pattern) and (result != 0).sum() == W.numel() * n // m
        assert is_positive_zero(result[result == 0]).all()
    result = sparsegpt_weight(W, 2 * X.T @ X, sparsity=0.3, block_size=10)
    assert [(part == 0).sum() for part in result.split(10, dim=1)] == [30, 30, 12]


def test_uncorrelated_inputs_leave_nothing_to_update() -> None:
    """With inputs that do not overlap the score is Wanda's, squared, and no other weight can make up for a pruned."""
    norms = torch.rand(16, dtype=torch.float64) + 0.5
    W = torch.randn(6, 16, dtype=torch.float64)
    result = sparsegpt_weight(W, torch.diag(2 * norms**2), pattern="2:4", damping=1e-12)
    expected = W * pruning_mask(W.abs() * norms, pattern="2:4")
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("request_", REQUESTS, ids=str)
def test_the_update_makes_the_error_smaller(request_: dict) -> None:
    X = correlated_inputs(300, 48)
    W = torch.randn(32, 48, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    updated = sparsegpt_weight(W, 2 * X.T @ X, **request_)
    only_masked = W * (updated != 0)
    assert (X @ (W - updated).T).norm() < (X @ (W - only_masked).T).norm()


def test_dead_inputs_are_pruned_and_do_no_harm() -> None:
    X = correlated_inputs(100, 16)
    X[:, [3, 8, 9]] = 0
    W = torch.randn(8, 16, dtype=torch.float64)
    result = sparsegpt_weight(W, 2 * X.T @ X, pattern="2:4")
    assert (result[:, [3, 8, 9]] == 0).all() and result.isfinite().all()
    torch.testing.assert_close(result, reference(W, X, pattern="2:4"), rtol=1e-12, atol=1e-12)


def test_the_weight_that_is_passed_is_not_changed() -> None:
    W = torch.randn(4, 8)
    before = W.clone()
    sparsegpt_weight(W, torch.eye(8), sparsity=0.5)
    assert torch.equal(W, before)


def layer_inputs(model: nn.Module, name: str, batches: list[torch.Tensor]) -> torch.Tensor:
    """What enters a layer when the whole model is run."""
    inputs: list[torch.Tensor] = []
    with model.get_submodule(name).register_forward_pre_hook(lambda module, args: inputs.append(args[0])):
        with torch.no_grad():
            for batch in batches:
                model.eval()(batch)
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs])


@pytest.mark.parametrize("model_name", ["llama", "gpt2"])
def test_block_by_block_matches_the_equations(
    model_name: str, request: pytest.FixtureRequest, calibration_batches: list[torch.Tensor]
) -> None:
    """Each block is pruned by the inputs that it gets once the blocks before it are pruned."""
    model = request.getfixturevalue(model_name).double()
    expected = copy.deepcopy(model)
    prune_sparsegpt(model, calibration_batches, pattern="2:4", block_size=8)

    blocks_name, blocks = find_blocks(model)
    for index in range(len(blocks)):
        layers = find_target_layers(model, rf"{blocks_name}\.{index}\..*")
        hessians = InputHessians({name: expected.get_submodule(name) for name in layers})
        inputs = {name: layer_inputs(expected, name, calibration_batches) for name in layers}
        with hessians, torch.no_grad():
            for batch in calibration_batches:
                expected.eval()(batch)
        for name, layer in layers.items():
            X = inputs[name]
            torch.testing.assert_close(hessians.compute()[name], 2 * X.T @ X, rtol=1e-12, atol=1e-12)
            dense = weight_matrix(expected.get_submodule(name)).detach()
            by_hand = reference(dense, X, pattern="2:4", block_size=8)
            torch.testing.assert_close(weight_matrix(layer).detach(), by_hand, rtol=1e-9, atol=1e-9)
        for name, layer in layers.items():
            expected.get_submodule(name).load_state_dict(layer.state_dict())


@pytest.mark.filterwarnings("ignore:Fewer than 16 calibration tokens")
@pytest.mark.parametrize(
    "kind", ["opt", "qwen2_moe", "deepseek_v3", "gpt_oss", "llama4_text", "gemma3", "qwen3_vl", "bloom", "gpt_neo"]
)
def test_other_architectures_match_the_equations(kind: str, calibration_batches: list[torch.Tensor]) -> None:
    """Padded, in float64, against whole forward passes of the sequences alone."""
    model = build(kind).double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3) if parameter.ndim > 1 else None
    batches = [
        {"input_ids": ids, "attention_mask": (torch.arange(12) < torch.tensor([[12], [7 + index]])).long()}
        for index, ids in enumerate(calibration_batches)
    ]
    expected = without_cache(model)
    prune_sparsegpt(model, batches, pattern="2:4", block_size=8)

    blocks_name, blocks = find_blocks(model)
    for index in range(len(blocks)):
        names = [name for name in find_target_layers(model, None) if name.startswith(f"{blocks_name}.{index}.")]
        inputs: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        with torch.no_grad(), seen_inputs(expected, names, lambda name, x, inputs=inputs: inputs[name].append(x)):
            for batch in batches:
                for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                    expected(input_ids=ids[None, : int(mask.sum())])
        for name in names:
            dense, pruned = weight_of(expected, name), weight_of(model, name)
            X = torch.cat(inputs[name]) if inputs[name] else dense[:0]
            if stack_of(model, name) is not None and len(X) < 16:
                X = torch.eye(dense.shape[1], dtype=torch.float64)
            by_hand = reference(dense, X, pattern="2:4", block_size=8)
            torch.testing.assert_close(pruned, by_hand, rtol=1e-6, atol=1e-6)
            dense.copy_(pruned)


def test_padding_does_not_count(llama: LlamaForCausalLM) -> None:
    tokens = torch.randint(0, 32, (1, 8))
    padded = torch.cat([tokens, torch.full((1, 24), 5)], dim=1)
    attention_mask = torch.tensor([[1] * 8 + [0] * 24])
    other = copy.deepcopy(llama)
    prune_sparsegpt(llama, [tokens], pattern="2:4")
    prune_sparsegpt(other, [{"input_ids": padded, "attention_mask": attention_mask}], pattern="2:4")
    for name, value in llama.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], msg=name)


def test_bfloat16_is_computed_in_float32(llama: LlamaForCausalLM, calibration_batches: list[torch.Tensor]) -> None:
    prune_sparsegpt(llama.to(torch.bfloat16), calibration_batches, pattern="2:4", exclude_modules=["down_proj"])
    for name, layer in find_target_layers(llama, None).items():
        assert layer.weight.dtype == torch.bfloat16
        assert satisfies_n_m(layer.weight, "2:4") != name.endswith("down_proj")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"damping": 0.0}, "damping should be positive"),
        ({"damping": float("nan")}, "damping should be positive"),
        ({"damping": float("inf")}, "damping should be positive and finite"),
        ({"block_size": 0}, "multiple of 4"),
        ({"block_size": 6}, "multiple of 4"),
    ],
)
def test_settings_are_checked(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseGPT("2:4", **arguments)


def test_a_hessian_without_inverse_names_the_layer() -> None:
    layer = nn.Linear(4, 2)
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match=r"inputs of my\.layer cannot be inverted"):
        SparseGPT("2:4", damping=1e-9).prune("my.layer", layer, -torch.eye(4))
    assert torch.equal(layer.weight, before)


def test_hessians_in_autocast_are_those_of_the_features_in_float64(llama: LlamaForCausalLM) -> None:
    """They are summed over so many batches that a sum in bfloat16 would stop to grow."""
    layer = llama.model.layers[0].mlp.up_proj
    inputs = torch.randn(400, 4, 16, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    hessians = InputHessians({"up_proj": layer})
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), hessians:
        for batch in inputs:
            layer(batch)
    X = inputs.double().reshape(-1, 16)
    hessian = hessians.compute()["up_proj"]
    assert hessian.dtype == torch.float32
    torch.testing.assert_close(hessian.double(), 2 * X.T @ X, rtol=1e-5, atol=1e-3)


def test_weights_in_autocast_are_updated_in_their_own_dtype(
    llama: LlamaForCausalLM, calibration_batches: list[torch.Tensor]
) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        prune_sparsegpt(llama, calibration_batches, pattern="2:4", block_size=8)
    for name, layer in find_target_layers(llama, None).items():
        assert layer.weight.dtype == torch.float32 and satisfies_n_m(layer.weight, "2:4")
        assert not torch.equal(layer.weight, layer.weight.bfloat16().float()), name


def test_the_update_of_a_layer_is_the_same_in_autocast() -> None:
    X = correlated_inputs(100, 32, torch.float32)
    hessian = 2 * X.T @ X
    layer = nn.Linear(32, 8)
    other = copy.deepcopy(layer)
    SparseGPT("2:4", block_size=8).prune("layer", layer, hessian)
    with torch.autocast("cpu", torch.bfloat16):
        SparseGPT("2:4", block_size=8).prune("layer", other, hessian)
    assert torch.equal(layer.weight, other.weight)
