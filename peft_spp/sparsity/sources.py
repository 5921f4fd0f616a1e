# SPDX-License-Identifier: Apache-2.0
"""The weights of any kind of source: a model, a state dict or files; none is read before it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from ..checkpoints.layout import Layout, says_transposed
from ..checkpoints.names import (
    is_adapter,
    is_fused_experts,
    matches,
    plain_name,
    special_role,
    without_match,
    wrapped_by_adapters,
)
from ..checkpoints.safetensors_files import stored_in_files
from ..checkpoints.stored import Stored
from ..functional.bitmask import Compressed
from ..functional.compressed import decompress
from ..reports import called
from .bits import FORMATS


@dataclass(frozen=True)
class Weight:
    """One weight of a source, not yet read."""

    name: str  # the plain name of its module
    shape: tuple[int, ...]  # its shape as stored
    dtype: str  # its dtype, such as `"bfloat16"`
    transposed: bool  # whether it is stored `(in, out)` and not `(out, in)`
    load: Callable[[], Tensor]  # reads it
    size: int | None = None  # the bytes that it takes, if it is stored without its zeros
    left_out: str | None = None  # why it does not count, if it does not
    unreadable: str | None = None  # why zeros cannot be told in it, if they cannot


@dataclass(frozen=True)
class Weights:
    """The weights of a source that may be linear layers."""

    label: str  # what to call the source
    found: dict[str, Weight]  # the weights that were asked for, by plain module name, in the order stored

    @property
    def linear(self) -> dict[str, Weight]:
        """The weights of linear layers, readable or not."""
        return {name: weight for name, weight in self.found.items() if weight.left_out is None}

    @property
    def skipped(self) -> dict[str, str]:
        """Why each weight that is not counted is not."""
        reasons = ((name, weight.left_out or weight.unreadable) for name, weight in self.found.items())
        return {name: reason for name, reason in reasons if reason}


Source = nn.Module | Mapping[str, Tensor] | str | PathLike[str]
"""What can be read: a model, a state dict, or a path to a safetensors file or folder."""


def open_weights(
    source: Source,
    *,
    modules: str | Sequence[str] | None = None,
    conv1d: bool | str | Sequence[str] | None = None,
) -> Weights:
    """List the weights of any kind of source; none is read yet."""
    listed: tuple[str, Any, Mapping[str, Any]]
    if isinstance(source, nn.Module):
        listed = stored_in_module(source)
    elif isinstance(source, Mapping):
        listed = stored_in_mapping(source)
    elif isinstance(source, (str, PathLike)):
        listed = stored_in_files(source)
    else:
        raise TypeError(f"expected a model, a state dict or a path to safetensors, got {type(source).__name__}")
    label, stored, config = listed
    return select(label, stored, config=config, modules=modules, conv1d=conv1d)


def select(
    label: str,
    stored: Iterable[Stored],
    *,
    config: Mapping[str, Any],
    modules: str | Sequence[str] | None,
    conv1d: bool | str | Sequence[str] | None,
) -> Weights:
    """Pick the weights of linear layers out of everything a source holds."""
    everything = list(stored)
    wrapped = wrapped_by_adapters(one.key for one in everything)
    mine = [one for one in everything if not is_adapter(one.key, wrapped)]
    layout = Layout({plain_name(one.key): one.shape for one in mine}, config, conv1d)

    found: dict[str, Weight] = {}
    keys: dict[str, str] = {}
    for one in everything:
        name, is_weight = _module_name(one.key)
        if len(one.shape) < 2 or (modules is not None and not matches(name, modules)):
            continue
        if is_adapter(one.key, wrapped):
            found[one.key] = _weight(one, one.key, transposed=False, left_out="adapter")
            continue
        if name in keys:
            raise ValueError(f"{label} has two weights for module {called(name)!r}: {keys[name]!r} and {one.key!r}")
        keys[name] = one.key
        left_out = _left_out(one, name, is_weight, chosen=modules is not None)
        if one.no_data and left_out is None:
            raise ValueError(
                f"module {called(name)!r} of {label} is on the meta device and has no data: load the model without "
                "offloading, or read its checkpoint folder instead"
            )
        transposed = one.transposed if one.transposed is not None else layout.is_transposed(name, len(one.shape))
        found[name] = _weight(one, name, transposed=transposed, left_out=left_out)
    linear = [name for name, weight in found.items() if weight.left_out is None]
    if modules is not None and not linear:
        raise ValueError(f"no linear layer of {label} matches modules={modules!r}")
    if modules is not None and (missing := without_match(modules, lambda one: any(matches(n, one) for n in linear))):
        raise ValueError(f"no linear layer of {label} matches {missing} of modules={modules!r}")
    return Weights(label, found)


def _module_name(key: str) -> tuple[str, bool]:
    """The plain name of the module a tensor belongs to, and whether the tensor is its `weight`."""
    plain = plain_name(key)
    if plain == "weight":
        return "", True
    return plain.removesuffix(".weight"), plain.endswith(".weight")


def _weight(one: Stored, name: str, *, transposed: bool, left_out: str | None) -> Weight:
    dtype = str(one.dtype).removeprefix("torch.")
    unreadable = one.problem
    if unreadable is None and one.dtype not in FORMATS:
        unreadable = f"unreadable: {dtype}"
    return Weight(name, one.shape, dtype, transposed, one.load, one.size, left_out, unreadable)


def _left_out(one: Stored, name: str, is_weight: bool, *, chosen: bool) -> str | None:
    """Why a tensor does not count as the weight of a linear layer; `None` if it does."""
    matrix = is_weight and len(one.shape) == 2
    role = special_role(name)
    if role in ("head", "router"):  # linear layers that pruning leaves alone: they count when asked for
        return None if chosen and matrix else role
    if one.linear or (len(one.shape) == 3 and is_fused_experts(name)):
        return None
    if role is None and one.linear is None and matrix:
        return None
    return role or "not a linear layer's weight"


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' `Conv1D`, told without importing transformers."""
    return any(
        kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils" for kind in type(module).__mro__
    )


def stored_in_module(model: nn.Module) -> tuple[str, Iterator[Stored], Mapping[str, Any]]:
    """List the weights of a model. It returns what to call it, its tensors, and its configuration."""
    label = type(model).__name__
    root = _unwrapped(model)
    config = getattr(root, "config", None)
    to_dict = getattr(config, "to_dict", None)
    return label, _walk(root), to_dict() if callable(to_dict) else {}


def stored_in_mapping(tensors: Mapping[str, Any]) -> tuple[str, Iterator[Stored], Mapping[str, Any]]:
    """List the tensors of a state dict. It returns what to call it, its tensors, and an empty configuration."""
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
        compressed = getattr(module, "compressed", None)
        if isinstance(compressed, Compressed):
            load = partial(_dense_weight, module)
            key, dtype, no_data = _join(name, "weight"), compressed.values.dtype, compressed.bitmask.is_meta
            size = compressed.values.nbytes + compressed.bitmask.nbytes
            yield Stored(key, compressed.shape, dtype, load, False, True, no_data=no_data, size=size)
            continue
        conv1d = is_conv1d(module)
        if conv1d or isinstance(module, nn.Linear):
            # The attribute and not the parameter: parametrizations and torch.nn.utils.prune compute it.
            if isinstance(module.weight, Tensor):
                yield _listed(
                    _join(name, "weight"), partial(getattr, module, "weight"), transposed=conv1d, linear=True
                )
            continue
        told = says_transposed(module)
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter_name in getattr(module, "stacks", ()):
                stack = cast(Any, module).compressed(parameter_name)
                load = partial(decompress, stack)
                key, dtype, no_data = _join(name, parameter_name), stack.values.dtype, stack.values.is_meta
                size = stack.values.nbytes + stack.bitmask.nbytes
                yield Stored(key, tuple(stack.shape), dtype, load, told, False, no_data=no_data, size=size)
                continue
            yield _listed(
                _join(name, parameter_name),
                partial(getattr, module, parameter_name),
                transposed=told if told is not None and parameter.dim() == 3 else None,
                linear=False,
            )


def _dense_weight(module: nn.Module) -> Tensor:
    return decompress(cast(Any, module).compressed)


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
