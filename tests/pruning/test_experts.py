# SPDX-License-Identifier: Apache-2.0
"""The experts of a mixture as linear layers, in memory."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from peft_spp.pruning import prune_magnitude, prune_sparsegpt, prune_wanda
from peft_spp.pruning.calibration_mode import calibration_mode
from peft_spp.pruning.input_statistics import FEW_TOKENS, InputHessians, InputNorms
from peft_spp.pruning.layers import find_target_layers, weight_matrix
from peft_spp.sparsity import sparsity_report

from helpers.mixtures import SAVED_ONE_BY_ONE, batches, expert_weights, mixture, most_in_a_group


BY_DATA = [prune_wanda, prune_sparsegpt]


def experts_of(model: nn.Module) -> dict:
    return {name: layer for name, layer in find_target_layers(model, None).items() if ".experts." in name}


def routed(model: nn.Module, data: list[torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What enters each experts module, and the experts that are chosen for each token, over all data."""
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    handles = []
    for name, module in model.named_modules():
        if name.endswith(".experts"):

            def note(module: nn.Module, args: tuple, kwargs: dict, name: str = name) -> None:
                values = [*args, *kwargs.values()]
                indices = next(one for one in values if not one.is_floating_point())
                found.setdefault(name, []).append((values[0].reshape(-1, values[0].shape[-1]), indices))

            handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    with torch.no_grad():
        for batch in data:
            model(batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: tuple(map(torch.cat, zip(*pairs, strict=True))) for name, pairs in found.items()}


def plain_inputs(model: nn.Module, data: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs of each expert, one matrix of tokens for each, by a plain loop."""
    weights = expert_weights(model)
    inputs = {}
    for name, (states, chosen) in routed(model, data).items():
        module = model.get_submodule(name)
        for index in range(module.num_experts):
            tokens = states[(chosen == index).any(dim=-1)]
            inputs[f"{name}.gate_up_proj.{index}"] = tokens
            up = tokens @ weights[f"{name}.gate_up_proj.{index}"].T
            if hasattr(module, "gate_up_proj_bias"):
                up = up + module.gate_up_proj_bias[index]
            inputs[f"{name}.down_proj.{index}"] = module._apply_gate(up).detach()
    return inputs


# those whose experts modules are called with what was chosen
CHOSEN = [kind for kind in SAVED_ONE_BY_ONE if kind != "llama4_text"]


@pytest.mark.parametrize("kind", CHOSEN)
def test_the_statistics_of_an_expert_are_those_of_a_plain_loop_in_float64(kind: str) -> None:
    model = mixture(kind, torch.float64)
    layers = experts_of(model)
    norms, hessians = InputNorms(layers), InputHessians(layers)
    with calibration_mode(model), torch.no_grad():
        expected = plain_inputs(model, batches())
        with norms, hessians:
            for batch in batches():
                model(batch, use_cache=False)
    assert expected.keys() == layers.keys()
    rarely = set(norms.rarely_reached())
    assert rarely == {name for name, one in expected.items() if len(one) < FEW_TOKENS}
    assert len(rarely) < len(layers)
    found, products = norms.compute(), hessians.compute()
    for name in layers.keys() - rarely:
        torch.testing.assert_close(found[name], expected[name].norm(dim=0), rtol=1e-12, atol=0)
        torch.testing.assert_close(products[name], 2 * expected[name].T @ expected[name], rtol=1e-10, atol=1e-10)


def test_experts_that_are_multiplied_all_at_once_get_their_own_tokens() -> None:
    """Llama 4's: the tokens of others are zeros there."""
    model = mixture("llama4_text", torch.float64)
    stacks = {name: module for name, module in model.named_modules() if name.endswith(".experts")}
    entering: dict[str, list[torch.Tensor]] = {name: [] for name in stacks}
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, name=name: entering[name].append(args[0].reshape(module.num_experts, -1, 32))
        )
        for name, module in stacks.items()
    ]
    layers = experts_of(model)
    norms = InputNorms(layers)
    with calibration_mode(model), torch.no_grad(), norms:
        for batch in batches():
            model(batch, use_cache=False)
    for handle in handles:
        handle.remove()
    found = norms.compute()
    checked = 0
    for name, batches_of_experts in entering.items():
        inputs = torch.cat(batches_of_experts, dim=1)
        for index, tokens in enumerate(inputs):
            reached = int(tokens.any(dim=1).sum())
            assert reached < len(tokens)
            layer = f"{name}.gate_up_proj.{index}"
            assert (layer in norms.rarely_reached()) is (reached < FEW_TOKENS)
            if reached >= FEW_TOKENS:
                torch.testing.assert_close(found[layer], tokens.norm(dim=0), rtol=1e-12, atol=0)
                checked += 1
    assert checked


@pytest.mark.parametrize("kind", CHOSEN)
def test_wanda_prunes_the_experts_of_the_first_block_as_a_plain_loop_does(kind: str) -> None:
    model = mixture(kind, torch.float64)
    with calibration_mode(model), torch.no_grad():
        inputs = plain_inputs(model, batches())
    before = {name: weight.clone() for name, weight in expert_weights(model).items()}
    first = next(iter(before)).partition(".experts.")[0]
    # nothing else is pruned, so that the inputs are those of the dense model
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Fewer than 16")
        prune_wanda(model, batches(), pattern="2:4", target_modules=re.escape(first) + r"\.experts\..*")
    for name, weight in expert_weights(model).items():
        if name.startswith(first):
            few = len(inputs[name]) < FEW_TOKENS
            scores = before[name].abs() * (1.0 if few else inputs[name].norm(dim=0))
            groups = scores.reshape(-1, 4)
            keep = torch.zeros_like(groups, dtype=torch.bool)
            keep.scatter_(1, groups.argsort(dim=1, stable=True)[:, 2:], True)
            assert torch.equal(weight, before[name] * keep.reshape(weight.shape)), name
        else:
            assert torch.equal(weight, before[name]), name


@pytest.mark.parametrize("kind", SAVED_ONE_BY_ONE)
@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_magnitude_prunes_each_expert_as_a_matrix_of_its_own(kind: str, sparsity: float | None) -> None:
    model = mixture(kind)
    before = {name: weight.clone() for name, weight in expert_weights(model).items()}
    prune_magnitude(model, sparsity=sparsity, pattern=None if sparsity else "2:4")
    for name, weight in expert_weights(model).items():
        linear = nn.ModuleList([nn.ModuleList([nn.Linear(*reversed(weight.shape), bias=False)])])
        linear[0][0].weight.data = before[name].contiguous()
        prune_magnitude(linear, sparsity=sparsity, pattern=None if sparsity else "2:4", target_modules=["0.0"])
        assert torch.equal(weight, linear[0][0].weight), name


def without(router: nn.Module, expert: int):
    """The forward of a router that chooses the next expert in place of one."""
    forward = router.forward

    def choose(*args, **kwargs):
        logits, values, indices = forward(*args, **kwargs)
        return logits, values, torch.where(indices == expert, (expert + 1) % len(router.weight), indices)

    return choose


@pytest.mark.parametrize("prune", BY_DATA)
def test_an_expert_without_tokens_is_pruned_by_magnitude_and_named(prune) -> None:
    model = mixture("mixtral")
    for layer in model.model.layers:
        layer.mlp.gate.forward = without(layer.mlp.gate, 3)
    by_magnitude = copy.deepcopy(model)
    prune_magnitude(by_magnitude, pattern="2:4")
    message = (
        r"Fewer than 16 calibration tokens reached 4 of the 16 expert weights, so these were pruned by magnitude: "
        r"model\.layers\.0\.mlp\.experts\.gate_up_proj\.3, model\.layers\.0\.mlp\.experts\.down_proj\.3, "
    )
    with pytest.warns(UserWarning, match=message):
        prune(model, batches(), pattern="2:4")
    expected = expert_weights(by_magnitude)
    same = {name for name, weight in expert_weights(model).items() if torch.equal(weight, expected[name])}
    assert same == {name for name in expected if name.endswith(".3")}


@pytest.mark.parametrize("prune", BY_DATA)
def test_experts_that_cannot_be_seen_are_refused_by_name_and_magnitude_prunes_them(prune) -> None:
    model = mixture("mixtral")
    experts = model.model.layers[1].mlp.experts

    def fused(states: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        weight = experts.gate_up_proj.clone()
        return states + (states @ weight[0].T).sum() * 1e-6

    experts.forward = fused
    before = copy.deepcopy(model.state_dict())
    message = (
        r"experts in model\.layers\.1\.mlp\.experts\.gate_up_proj: .*MixtralExperts .*exclude_modules=.*magnitude"
    )
    with pytest.raises(ValueError, match=message):
        prune(model, batches(), pattern="2:4")
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    stacks = [f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    prune(model, batches(), pattern="2:4", exclude_modules=stacks)
    assert (expert_weights(model)["model.layers.1.mlp.experts.down_proj.0"] != 0).all()
    prune_magnitude(model, pattern="2:4")
    assert {most_in_a_group(weight) for weight in expert_weights(model).values()} == {2}


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
def test_the_experts_implementation_is_restored_and_does_not_matter(implementation: str) -> None:
    model = mixture("qwen3_moe")
    model.set_experts_implementation(implementation)
    prune_wanda(model, batches(), pattern="2:4")
    assert model.get_experts_implementation() == {"": implementation}
    expected = mixture("qwen3_moe")
    prune_wanda(expected, batches(), pattern="2:4")
    assert all(torch.equal(one, expected.state_dict()[name]) for name, one in model.state_dict().items())


def test_names_select_a_stack_or_one_expert() -> None:
    model = mixture("mixtral")
    stack = "model.layers.0.mlp.experts.down_proj"
    every = [f"{stack}.{index}" for index in range(4)]
    assert list(find_target_layers(model, [stack])) == every
    assert list(find_target_layers(model, ["layers.0.mlp.experts.down_proj"])) == every
    assert list(find_target_layers(model, [f"{stack}.2"])) == [every[2]]
    assert list(find_target_layers(model, r".*\.0\.mlp\.experts\.down_proj\.[12]")) == every[1:3]
    assert list(find_target_layers(model, [stack], [f"{stack}.2"])) == [every[0], every[1], every[3]]
    found = find_target_layers(model, None, ["experts.gate_up_proj"])
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in found if ".experts." in name} == {"down_proj"}
    assert not any(name.endswith(".gate") for name in find_target_layers(model, None))


def test_masks_are_in_the_stack_and_the_report_knows_them() -> None:
    model = mixture("gpt_oss")
    prune_magnitude(model, pattern="2:4")
    report = sparsity_report(model)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert report[name].transposed and report[name].pattern == "2:4"
    layer = find_target_layers(model, None)[f"{name}.3"]
    assert layer.weight.data_ptr() == model.get_parameter(name)[3].data_ptr()
    assert torch.equal(weight_matrix(layer), model.get_parameter(name)[3].T)


def test_what_m_does_not_divide_and_what_is_broken_is_named() -> None:
    model = mixture("mixtral")
    with pytest.raises(ValueError, match=r"24 input features of .*experts\.down_proj\.0 are not divisible by the M"):
        prune_magnitude(model, pattern="8:16")
    model.model.layers[1].mlp.experts.down_proj.data[2, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj\.2 contains NaN"):
        prune_magnitude(model, pattern="2:4")


def test_a_stack_that_is_computed_or_shared_is_refused() -> None:
    class Doubled(nn.Module):
        def forward(self, stack: torch.Tensor) -> torch.Tensor:
            return 2 * stack

    model = mixture("mixtral")
    parametrize.register_parametrization(model.model.layers[0].mlp.experts, "down_proj", Doubled())
    message = r"layers\.0\.mlp\.experts\.down_proj\.0 is computed from other tensors by `torch.nn.utils.parametrize`"
    with pytest.raises(ValueError, match=message):
        prune_magnitude(model, pattern="2:4")

    model = mixture("mixtral")
    first, second = (layer.mlp.experts for layer in model.model.layers)
    second.down_proj = first.down_proj
    message = r"0\.mlp\.experts\.down_proj\.0 shares its weight with model\.layers\.1\.mlp\.experts\.down_proj"
    with pytest.raises(ValueError, match=message):
        prune_wanda(model, batches(), pattern="2:4")
