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
) -> torch.Tensor:
    """`x @ W'.T + bias` for the `(m, n)` weight, with the backend's `scaled_weight`."""
    effective = backend.scaled_weight(weight, factors, identity, dtype)
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
) -> list[torch.Tensor]:
    """The gradients of x, if needed, and then of A and B of each adapter, if needed."""
    m, n = weight.shape
    grads = []
    if needs_x:
        effective = backend.scaled_weight(weight, factors, identity, dtype)
        grads.append(torch.matmul(grad_y, effective).to(x.dtype))
        del effective  # one m×n tensor at a time: the product below is the next
    if needs_factors:
        x2d, grad_y2d = x.reshape(-1, n).to(dtype), grad_y.reshape(-1, m)
        # in the memory layout of the weight, so that the pass over both walks them alike
        transposed = weight.stride(0) < weight.stride(1)
        product = (x2d.t() @ grad_y2d).t() if transposed else grad_y2d.t() @ x2d
        for pair in backend.factor_gradients(product, weight, factors):
            grads.extend(pair)
    return grads
