# SPDX-License-Identifier: Apache-2.0
"""
Wanda in float64 with plain hooks, on PyTorch itself for experts, and whole forward passes, to compare the block by
block way with.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

from peft_spp.pruning import prune_wanda
from peft_spp.pruning.layers import find_target_layers

from helpers.mixtures import INPUTS_FIRST


SEED = 0  # of what a model draws in its forward


def without_cache(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose configurations, however nested, all say that there is no cache."""
    model = copy.deepcopy(model).eval()
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    for config in configs:
        configs += [value for value in vars(config).values() if hasattr(value, "model_type") and value not in configs]
        if hasattr(config, "use_cache"):
            config.use_cache = False
    return model


def weight_of(model: nn.Module, name: str) -> torch.Tensor:
    """The weight of a linear layer or of an expert as an `(out, in)` matrix, a view."""
    stack = stack_of(model, name)
    if stack is None:
        layer = model.get_submodule(name)
        weight = layer.weight.detach()
        return weight.T if type(layer).__name__ == "Conv1D" else weight
    parameter, inputs_first = stack
    weight = parameter.detach()[int(name.rpartition(".")[2])]
    return weight.T if inputs_first else weight


def stack_of(model: nn.Module, name: str) -> tuple[nn.Parameter, bool] | None:
    """The parameter that holds an expert, and whether it stores inputs first; `None` for a linear layer."""
    parameters = dict(model.named_parameters())
    stack = name.rpartition(".")[0]
    stack = stack if stack in parameters else f"{stack}.weight"
    if stack not in parameters or parameters[stack].ndim != 3:
        return None
    module = model.get_submodule(stack.rpartition(".")[0])
    return parameters[stack], getattr(module, "is_transposed", type(module).__name__ in INPUTS_FIRST)


@contextmanager
def seen_inputs(model: nn.Module, names: Iterable[str], add: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """While active, call `add` with the inputs of layers, `(tokens, in)`; of experts, by calls of PyTorch."""
    handles, experts = [], {}
    for name in names:
        stack = stack_of(model, name)
        if stack is not None:
            experts[stack[0][int(name.rpartition(".")[2])].data_ptr()] = name
            continue

        def hook(module: nn.Module, args: tuple, kwargs: dict, name: str = name) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            add(name, x.reshape(-1, x.shape[-1]))

        handles.append(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))

    def see(function: Callable) -> Callable:
        def call(x: torch.Tensor, weight: torch.Tensor, *others: Any, **more: Any) -> torch.Tensor:
            if weight.ndim == 2 and weight.data_ptr() in experts:
                add(experts[weight.data_ptr()], x.reshape(-1, x.shape[-1]))
            elif weight.ndim == 3 and x.ndim == 3:
                for rows, one in zip(x, weight, strict=True):
                    if one.data_ptr() in experts:
                        add(experts[one.data_ptr()], rows[rows.abs().sum(dim=1) > 0])
            return function(x, weight, *others, **more)

        return call

    functions = [(nn.functional, "linear"), (torch, "bmm"), (torch.Tensor, "__matmul__")] if experts else []
    with ExitStack() as patches:
        for owner, function in functions:
            patches.enter_context(mock.patch.object(owner, function, see(getattr(owner, function))))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def squared_norms(
    model: nn.Module, names: Iterable[str], sequences: Iterable[dict[str, Any]]
) -> dict[str, torch.Tensor]:
    """
    Σ x² of each input of some layers, over whole forward passes of a model, from a fixed seed.

    For experts that fewer than 16 tokens reach, they are ones, if any token reaches another of the stack.
    """
    torch.manual_seed(SEED)
    names = list(names)
    sums: dict[str, torch.Tensor] = {}
    tokens: Counter[str] = Counter()

    def add(name: str, x: torch.Tensor) -> None:
        sums[name] = sums.get(name, 0) + x.double().square().sum(dim=0)
        tokens[name] += len(x)

    with torch.no_grad(), seen_inputs(model, names, add):
        for sequence in sequences:
            model(**sequence)
    reached = {name.rpartition(".")[0] for name in names if tokens[name]}
    for name in names:
        if tokens[name] < 16 and name.rpartition(".")[0] in reached and stack_of(model, name) is not None:
            sums[name] = torch.ones(weight_of(model, name).shape[1], dtype=torch.float64)
    return sums


def plain_wanda(
    model: nn.Module,
    names: Iterable[str],
    sequences: list[dict[str, Any]],
    n: int = 2,
    m: int = 4,
) -> dict[str, torch.Tensor]:
    """
    The weights that Wanda gives the layers and experts `names`, block after block, as `(out, in)` matrices.

    A block is told by the first number in the name of a layer. The model stays dense.
    """
    model = without_cache(model)
    by_block: dict[int, list[str]] = {}
    for name in names:
        by_block.setdefault(int(next(part for part in name.split(".") if part.isdigit())), []).append(name)
    pruned: dict[str, torch.Tensor] = {}
    for index in sorted(by_block):
        sums = squared_norms(model, by_block[index], sequences)
        for name in by_block[index]:
            weight = weight_of(model, name)
            scores = (weight.double().abs() * sums[name].sqrt()).reshape(-1, m)
            keep = torch.zeros_like(scores, dtype=torch.bool)
            keep.scatter_(1, scores.argsort(dim=1, stable=True)[:, m - n :], True)
            weight.mul_(keep.reshape(weight.shape))
            pruned[name] = weight.clone()
    return pruned


def weights_of(model: nn.Module, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """The weights of some layers of a pruned model, as `(out, in)` matrices."""
    return {name: weight_of(model, name) for name in names}


def in_float64(model: nn.Module) -> nn.Module:
    """With weights so large that attention matters, and experts in the one way that runs in float64."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3) if parameter.ndim > 1 else None
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.double()


def assert_plain_wanda(
    model: nn.Module, batches: list[Any], sequences: list[dict[str, Any]], excluded: list[str] | None = None
) -> None:
    """Prune `model` on the batches: each weight has to be what plain Wanda makes of the sequences."""
    dense = copy.deepcopy(model)
    prune_wanda(model, batches, pattern="2:4", exclude_modules=excluded)
    names = list(find_target_layers(model, None, excluded))
    expected, pruned = plain_wanda(dense, names, sequences), weights_of(model, names)
    assert [name for name in names if not torch.equal(pruned[name], expected[name])] == []
