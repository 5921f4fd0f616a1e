# SPDX-License-Identifier: Apache-2.0
"""Wanda in float64 with plain hooks and whole forward passes, to compare the block by block way with."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


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


def squared_norms(
    model: nn.Module, names: Iterable[str], sequences: Iterable[dict[str, Any]]
) -> dict[str, torch.Tensor]:
    """Σ x² of each input of some linear layers, over whole forward passes of a model, from a fixed seed."""
    torch.manual_seed(SEED)
    sums: dict[str, torch.Tensor] = {}
    handles = []
    for name in names:

        def add(module: nn.Module, args: tuple, kwargs: dict, name: str = name) -> None:
            x = (args[0] if args else next(iter(kwargs.values()))).double()
            sums[name] = sums.get(name, 0) + x.reshape(-1, x.shape[-1]).square().sum(dim=0)

        handles.append(model.get_submodule(name).register_forward_pre_hook(add, with_kwargs=True))
    with torch.no_grad():
        for sequence in sequences:
            model(**sequence)
    for handle in handles:
        handle.remove()
    return sums


def plain_wanda(
    model: nn.Module,
    names: Iterable[str],
    sequences: list[dict[str, Any]],
    n: int = 2,
    m: int = 4,
) -> dict[str, torch.Tensor]:
    """
    The weights that Wanda gives the layers `names`, block after block, as `(out, in)` matrices.

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
            layer = model.get_submodule(name)
            weight = layer.weight.detach()
            weight = weight.T if type(layer).__name__ == "Conv1D" else weight
            scores = (weight.double().abs() * sums[name].sqrt()).reshape(-1, m)
            keep = torch.zeros_like(scores, dtype=torch.bool)
            keep.scatter_(1, scores.argsort(dim=1, stable=True)[:, m - n :], True)
            weight.mul_(keep.reshape(weight.shape))
            pruned[name] = weight.clone()
    return pruned


def weights_of(model: nn.Module, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """The weights of some layers of a pruned model, as `(out, in)` matrices."""
    layers = {name: model.get_submodule(name) for name in names}
    return {
        name: layer.weight.detach().T if type(layer).__name__ == "Conv1D" else layer.weight.detach()
        for name, layer in layers.items()
    }
