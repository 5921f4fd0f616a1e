# SPDX-License-Identifier: Apache-2.0
"""The layer by way of its weight, for a backend that makes W' whole: one matmul forward and two backward."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
import torch.nn.functional as F

from ..factors import Factors


def linear(
    backend: ModuleType,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    factors: Sequence[Factors],
    identity: bool,
    dtype: torch.dtype,
    overwrite: bool = False,
) -> torch.Tensor:
    """`x @ W'.T + bias` for the `(m, n)` weight, with the backend's `scaled_weight`; W' may be written over W."""
    effective = backend.scaled_weight(weight, factors, identity, dtype, out=_buffer(weight, dtype, overwrite))
    y = F.linear(x.to(dtype).reshape(-1, x.shape[-1]), effective, None if bias is None else bias.to(dtype))
    # not a view: see `cpu.linear`
    result: torch.Tensor = torch.ops.aten._unsafe_view(y, (*x.shape[:-1], effective.shape[0]))
    return result


def linear_backward(
    backend: ModuleType,
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    factors: Sequence[Factors],
    identity: bool,
    dtype: torch.dtype,
    needs_x: bool,
    needs_factors: bool,
    overwrite: bool = False,
) -> list[torch.Tensor]:
    """The gradients of x, if needed, and then of A and B of each adapter, if needed; W' may be written over W."""
    # one m×n tensor next to the weight at a time: first gyᵀx and then W', which may take the weight's place
    grads = _factor_gradients(backend, grad_y, x, weight, factors, dtype) if needs_factors else []
    if needs_x:
        effective = backend.scaled_weight(weight, factors, identity, dtype, out=_buffer(weight, dtype, overwrite))
        grads.insert(0, torch.matmul(grad_y, effective).to(x.dtype))
    return grads


def _factor_gradients(
    backend: ModuleType,
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    factors: Sequence[Factors],
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    m, n = weight.shape
    x2d, grad_y2d = x.reshape(-1, n).to(dtype), grad_y.reshape(-1, m)
    # in the memory layout of the weight, so that the pass over both walks them alike
    transposed = weight.stride(0) < weight.stride(1)
    product = (x2d.t() @ grad_y2d).t() if transposed else grad_y2d.t() @ x2d
    return [grad for pair in backend.factor_gradients(product, weight, factors) for grad in pair]


def _buffer(weight: torch.Tensor, dtype: torch.dtype, overwrite: bool) -> torch.Tensor | None:
    """Where to write W': over the weight if that is allowed and it has the dtype of W'."""
    return weight if overwrite and weight.dtype == dtype else None
