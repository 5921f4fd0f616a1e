# SPDX-License-Identifier: Apache-2.0
"""The layers that every competitor adapts: all linear layers inside the transformer blocks."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def block_linear_names(model: nn.Module) -> list[str]:
    """The names of all `nn.Linear` inside an `nn.ModuleList` of the model."""
    lists = [f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(tuple(lists))
    ]


def block_linear_suffixes(model: nn.Module) -> list[str]:
    """
    The last parts of those names, such as `q_proj`, for PEFT's `target_modules`.

    Raises:
        ValueError: If a linear layer outside the blocks has such a name too.
    """
    names = set(block_linear_names(model))
    suffixes = sorted({name.rpartition(".")[2] for name in names})
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in names and name.rpartition(".")[2] in suffixes:
            raise ValueError(f"The linear layer {name!r} is outside the blocks, but its name ends like one inside.")
    return suffixes


def replace_block_linears(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """
    Freeze the model, then put `make(layer)` in the place of every linear layer inside the blocks.

    Args:
        model (`nn.Module`): The model, changed in place.
        make (`Callable[[nn.Linear], nn.Module]`): Makes the new layer from the frozen one.

    Returns:
        `nn.Module`: The model.
    """
    model.requires_grad_(False)
    for name in block_linear_names(model):
        parent, _, child = name.rpartition(".")
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        setattr(model.get_submodule(parent), child, make(layer))
    return model
