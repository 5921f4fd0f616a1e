# SPDX-License-Identifier: Apache-2.0
"""
The operators for weights without their zeros: `torch.ops.peft_spp.compressed_*`.

They take a [`~peft_spp.functional.bitmask.Compressed`] as the tensors and the number that it consists of.
"""

from __future__ import annotations

import torch
from torch.library import Library, register_fake

from ..bitmask import Compressed
from .backend import KernelBackend
from .ops import implement, like_factors, pack
from .scaled import ScaledWeight


_library = Library("peft_spp", "FRAGMENT")
_COMPRESSED = "Tensor values, Tensor bitmask, Tensor row_offsets, int columns"
_FACTORS = "Tensor[] A, Tensor[] B, float[] scaling, bool identity, ScalarType dtype"
_library.define(f"compressed_weight({_COMPRESSED}, {_FACTORS}) -> Tensor")
_library.define(f"compressed_linear(Tensor x, {_COMPRESSED}, Tensor? bias, {_FACTORS}) -> Tensor")
# the gradients that are needed, in this order: x, then A and B of each adapter
_library.define(
    f"compressed_linear_backward(Tensor grad_y, Tensor x, {_COMPRESSED}, {_FACTORS}, bool needs_x, "
    "bool needs_factors) -> Tensor[]"
)


def _weight(
    backend: KernelBackend,
    values: torch.Tensor,
    bitmask: torch.Tensor,
    row_offsets: torch.Tensor,
    columns: int,
    A: list[torch.Tensor],
    B: list[torch.Tensor],
    scaling: list[float],
    identity: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    weight = Compressed(values, bitmask, row_offsets, columns)
    return backend.compressed_weight(ScaledWeight(weight, pack(A, B, scaling), identity, dtype))


def linear(
    backend: KernelBackend,
    x: torch.Tensor,
    values: torch.Tensor,
    bitmask: torch.Tensor,
    row_offsets: torch.Tensor,
    columns: int,
    bias: torch.Tensor | None,
    A: list[torch.Tensor],
    B: list[torch.Tensor],
    scaling: list[float],
    identity: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """What the operator `compressed_linear` runs on a backend."""
    weight = Compressed(values, bitmask, row_offsets, columns)
    return backend.linear(x, ScaledWeight(weight, pack(A, B, scaling), identity, dtype), bias)


def _linear_backward(
    backend: KernelBackend,
    grad_y: torch.Tensor,
    x: torch.Tensor,
    values: torch.Tensor,
    bitmask: torch.Tensor,
    row_offsets: torch.Tensor,
    columns: int,
    A: list[torch.Tensor],
    B: list[torch.Tensor],
    scaling: list[float],
    identity: bool,
    dtype: torch.dtype,
    needs_x: bool,
    needs_factors: bool,
) -> list[torch.Tensor]:
    weight = Compressed(values, bitmask, row_offsets, columns)
    w = ScaledWeight(weight, pack(A, B, scaling), identity, dtype)
    return backend.linear_backward(grad_y, x, w, needs_x, needs_factors)


implement(
    _library,
    {
        "compressed_weight": _weight,
        "compressed_linear": linear,
        "compressed_linear_backward": _linear_backward,
    },
)


@register_fake("peft_spp::compressed_weight")
def _(
    values: torch.Tensor,
    bitmask: torch.Tensor,
    row_offsets: torch.Tensor,
    columns: int,
    A: list[torch.Tensor],
    B: list[torch.Tensor],
    scaling: list[float],
    identity: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    return values.new_empty((*bitmask.shape[:-1], columns), dtype=dtype)


@register_fake("peft_spp::compressed_linear")
def _(
    x: torch.Tensor,
    values: torch.Tensor,
    bitmask: torch.Tensor,
    row_offsets: torch.Tensor,
    columns: int,
    bias: torch.Tensor | None,
    A: list[torch.Tensor],
    B: list[torch.Tensor],
    scaling: list[float],
    identity: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], bitmask.shape[0]), dtype=dtype)


@register_fake("peft_spp::compressed_linear_backward")
def _(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    values: torch.Tensor,
    bitmask: torch.Tensor,
    row_offsets: torch.Tensor,
    columns: int,
    A: list[torch.Tensor],
    B: list[torch.Tensor],
    scaling: list[float],
    identity: bool,
    dtype: torch.dtype,
    needs_x: bool,
    needs_factors: bool,
) -> list[torch.Tensor]:
    return ([x.new_empty(x.shape)] if needs_x else []) + (like_factors(A, B) if needs_factors else [])
