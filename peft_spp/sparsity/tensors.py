# SPDX-License-Identifier: Apache-2.0
"""The tensors of a model or a state dict in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from .weights import Stored


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' `Conv1D`, told without importing transformers.

    Args:
        module (`nn.Module`): Any module.

    Returns:
        `bool`: Whether its class, or one it derives from, is `transformers.pytorch_utils.Conv1D`.
    """
    return any(
        kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils" for kind in type(module).__mro__
    )


def stored_in_module(model: nn.Module) -> tuple[str, Iterator[Stored], Mapping[str, Any]]:
    """List the weights of a model.

    Args:
        model (`nn.Module`): A model; a `PeftModel` is listed as the model underneath.

    Returns:
        `tuple[str, Iterator[Stored], Mapping[str, Any]]`: What to call it, its tensors, and its configuration.
    """
    label = type(model).__name__
    root = _unwrapped(model)
    config = getattr(root, "config", None)
    to_dict = getattr(config, "to_dict", None)
    return label, _walk(root), to_dict() if callable(to_dict) else {}


def stored_in_mapping(tensors: Mapping[str, Any]) -> tuple[str, Iterator[Stored], Mapping[str, Any]]:
    """List the tensors of a state dict.

    Args:
        tensors (`Mapping[str, torch.Tensor]`): A state dict; values that are no tensors are passed over.

    Returns:
        `tuple[str, Iterator[Stored], Mapping[str, Any]]`: What to call it, its tensors, and an empty configuration.

    Raises:
        ValueError: If it holds something, but no tensor under a name.
    """
    names = [name for name, value in tensors.items() if isinstance(name, str) and isinstance(value, Tensor)]
    if tensors and not names:
        raise ValueError(
            f"expected a mapping of names to tensors, got one with the keys {', '.join(map(repr, list(tensors)[:5]))}"
        )
    return "state dict", (_listed(name, partial(tensors.__getitem__, name)) for name in names), {}


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "peft_config") and callable(getattr(model, "get_base_model", None)):
            # A PeftModel; its own name for the model differs between tuners and prompt learning.
            model = cast(Any, model).get_base_model()
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]  # torch.compile
        else:
            return model


def _walk(root: nn.Module) -> Iterator[Stored]:
    for name, module in root.named_modules():
        conv1d = is_conv1d(module)
        if conv1d or isinstance(module, nn.Linear):
            # The attribute and not the parameter: parametrizations and torch.nn.utils.prune compute it.
            if isinstance(module.weight, Tensor):
                yield _listed(
                    _join(name, "weight"), partial(getattr, module, "weight"), transposed=conv1d, linear=True
                )
            continue
        experts_transposed = getattr(module, "is_transposed", None)
        for parameter_name, parameter in module.named_parameters(recurse=False):
            yield _listed(
                _join(name, parameter_name),
                partial(getattr, module, parameter_name),
                transposed=experts_transposed
                if isinstance(experts_transposed, bool) and parameter.dim() == 3
                else None,
                linear=False,
            )


def _join(name: str, last: str) -> str:
    return f"{name}.{last}" if name else last


def _listed(key: str, load: Any, *, transposed: bool | None = None, linear: bool | None = None) -> Stored:
    tensor: Tensor = load()
    lazy = is_lazy(tensor)
    shape = (0, 0) if lazy else tuple(tensor.shape)
    problem = None
    if tensor.layout != torch.strided or type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        problem = f"unreadable: {type(tensor).__name__}, {tensor.layout}"
    return Stored(key, shape, tensor.dtype, load, transposed, linear, problem, no_data=lazy or tensor.is_meta)
