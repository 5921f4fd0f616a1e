# SPDX-License-Identifier: Apache-2.0
"""
The operators for weights without their zeros: `torch.ops.peft_spp.compressed_*`.

They take a [`~peft_spp.functional.bitmask.Compressed`] as the tensors and the number that it consists of. Where a
device has no kernels for it, the weight is expanded, used, and dropped.
"""

from __future__ import annotations

import torch
from torch.library import Library, register_fake

from ..bitmask import Compressed, decompress
from . import schema  # noqa: F401  (the operators for dense weights are defined there)


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
    dense = decompress(Compressed(values, bitmask, row_offsets, columns))
    return _scaled(dense, A, B, scaling, identity, dtype)


def _linear(
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
    dense = decompress(Compressed(values, bitmask, row_offsets, columns))
    result: torch.Tensor
    if A:
        result = torch.ops.peft_spp.linear_in_place(x, dense, bias, A, B, scaling, identity, dtype)
    else:
        result = torch.nn.functional.linear(x.to(dtype), dense.to(dtype), None if bias is None else bias.to(dtype))
    return result


def _linear_backward(
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
    dense = decompress(Compressed(values, bitmask, row_offsets, columns))
    if not A:
        return [torch.matmul(grad_y, dense.to(dtype)).to(x.dtype)] if needs_x else []
    grads: list[torch.Tensor] = torch.ops.peft_spp.linear_in_place_backward(
        grad_y, x, dense, A, B, scaling, identity, dtype, needs_x, needs_factors
    )
    return grads


def _scaled(
    dense: torch.Tensor,
    A: list[torch.Tensor],
    B: list[torch.Tensor],
    scaling: list[float],
    identity: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    if not A:
        return dense.to(dtype)
    result: torch.Tensor = torch.ops.peft_spp.scaled_weight(dense, A, B, scaling, identity, dtype)
    return result


_library.impl("compressed_weight", _weight, "CompositeExplicitAutograd")
_library.impl("compressed_linear", _linear, "CompositeExplicitAutograd")
_library.impl("compressed_linear_backward", _linear_backward, "CompositeExplicitAutograd")


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
    grads = [x.new_empty(x.shape)] if needs_x else []
    if needs_factors:
        grads.extend(t.new_empty(t.shape) for pair in zip(A, B, strict=True) for t in pair)
    return grads
