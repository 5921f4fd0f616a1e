# SPDX-License-Identifier: Apache-2.0
"""Picking the weights of linear layers out of everything a source holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..reports import called
from .bits import FORMATS
from .layout import Layout
from .names import is_adapter, is_fused_experts, matches, plain_name, special_role, wrapped_by_adapters
from .weights import Stored, Weight, Weights


def select(
    label: str,
    stored: Iterable[Stored],
    *,
    config: Mapping[str, Any],
    modules: str | Sequence[str] | None,
    conv1d: bool | str | Sequence[str] | None,
) -> Weights:
    """Pick the weights of linear layers out of everything a source holds.

    Args:
        label (`str`): What to call the source.
        stored (`Iterable[Stored]`): Every tensor of the source.
        config (`Mapping[str, Any]`): The model's configuration, empty if unknown.
        modules (`str`, `Sequence[str]` or `None`): Which modules are asked for; see [`sparsity_report`].
        conv1d (`bool`, `str`, `Sequence[str]` or `None`): Which are stored `(in, out)`; see [`sparsity_report`].

    Returns:
        `Weights`: The weights of two or more dimensions that were asked for, with what is known about each.

    Raises:
        ValueError: If nothing matches `modules`, two weights have the same plain name, or one holds no data.
    """
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
            raise ValueError(f"{label} holds two weights for module {called(name)!r}: {keys[name]!r} and {one.key!r}")
        keys[name] = one.key
        left_out = _left_out(one, name, is_weight, chosen=modules is not None)
        if one.no_data and left_out is None:
            raise ValueError(
                f"module {called(name)!r} of {label} is on the meta device and holds no data: load the model without "
                "offloading, or read its checkpoint folder instead"
            )
        transposed = one.transposed if one.transposed is not None else layout.is_transposed(name, len(one.shape))
        found[name] = _weight(one, name, transposed=transposed, left_out=left_out)
    if modules is not None and not any(weight.left_out is None for weight in found.values()):
        raise ValueError(f"no linear layer of {label} matches modules={modules!r}")
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
    return Weight(name, one.shape, dtype, transposed, one.load, left_out, unreadable)


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
