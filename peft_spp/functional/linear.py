# SPDX-License-Identifier: Apache-2.0
"""A linear layer with an SPP-scaled weight, as one autograd Function."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from .weight import (
    FactorGradients,
    Factors,
    _scaled_weight_composite,
    check_factors,
    compute_dtype,
    factor_gradients,
    is_chunked,
    scaled_weight,
    scaled_weight_chunks,
)


def spp_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    factors: Sequence[Factors],
    *,
    fan_in_fan_out: bool = False,
    identity: bool = True,
) -> torch.Tensor:
    """
    `x @ W'.T + bias` with W' = W ⊙ (1 + Σ s · P(A) ⊙ B), SPP's equation 4.

    One matmul forward and two backward: the forward pass builds W' once and keeps nothing of its size, the backward
    pass builds it again for the gradient of `x` and reduces `(gyᵀ x) ⊙ W` to the gradients of A and B. Between the two
    only `x` and the parameters themselves are kept. Inside autocast the matmuls run in autocast's dtype; W' is then
    rounded once from float32 to it.

    Args:
        x (`torch.Tensor`): Input, shape `(*, n)`, of the weight's dtype unless autocast is on.
        weight (`torch.Tensor`): W, shape `(m, n)`, or `(n, m)` with `fan_in_fan_out`.
        bias (`torch.Tensor`, *optional*): shape `(m,)`.
        factors (`Sequence[Factors]`): The factors of each active adapter; any floating dtype.
        fan_in_fan_out (`bool`): Whether the weight is stored as `(n, m)`, like Transformers' `Conv1D`.
        identity (`bool`): With `False` the 1 is left out: the result is what the adapters add to the base layer.

    Returns:
        `torch.Tensor`: shape `(*, m)`, in the dtype of the matmul.

    Raises:
        ValueError: If the shapes of the factors do not fit the weight.
    """
    device_type = x.device.type
    dtype = weight.dtype
    if torch.is_autocast_enabled(device_type) and torch.float64 not in (x.dtype, weight.dtype):
        dtype = torch.get_autocast_dtype(device_type)
    elif x.dtype != dtype:
        # what nn.Linear says of such a call
        raise RuntimeError(f"mat1 and mat2 must have the same dtype, but got {x.dtype} and {dtype}")
    scalings = tuple(f.scaling for f in factors)
    tensors = [t for f in factors for t in (f.A, f.B)]
    with _autocast_off(device_type):
        if not torch.is_grad_enabled():
            # nothing to save, and a Function that saves is a graph break where gradients are off
            return _forward(x, weight, bias, factors, fan_in_fan_out, identity, dtype)
        return _SPPLinear.apply(x, weight, bias, fan_in_fan_out, identity, dtype, scalings, *tensors)


class _SPPLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        fan_in_fan_out: bool,
        identity: bool,
        dtype: torch.dtype,
        scalings: tuple[float, ...],
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        # The parameters themselves are saved, not views or casts of them: sharded training may free and gather their
        # storage between forward and backward. x is saved as it came, so that layers that share it share one copy.
        ctx.save_for_backward(x, weight, bias, *tensors)
        ctx.settings = (fan_in_fan_out, identity, dtype, scalings)
        return _forward(x, weight, bias, _pack(tensors, scalings), fan_in_fan_out, identity, dtype)

    @staticmethod
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias, *tensors = ctx.saved_tensors
        with _autocast_off(grad_y.device.type):
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                return _differentiable_backward(ctx, grad_y, x, weight, bias, tensors)
            return _backward(ctx.needs_input_grad, grad_y, x, weight, bias, tensors, *ctx.settings)


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    factors: Sequence[Factors],
    fan_in_fan_out: bool,
    identity: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    w = weight.t() if fan_in_fan_out else weight
    x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    if is_chunked(w, factors):
        return _forward_chunked(x, w, bias, factors, identity)
    return F.linear(x, scaled_weight(w, factors, identity=identity, dtype=dtype), bias)


def _forward_chunked(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, factors: Sequence[Factors], identity: bool
) -> torch.Tensor:
    check_factors(w, factors)
    x2d = x.reshape(-1, w.shape[1])
    y = torch.empty(x2d.shape[0], w.shape[0], dtype=x.dtype)
    for rows, chunk in scaled_weight_chunks(w, factors, identity, x.dtype):
        if bias is None:
            torch.mm(x2d, chunk.t(), out=y[:, rows])
        else:
            torch.addmm(bias[rows], x2d, chunk.t(), out=y[:, rows])
    return y.view(*x.shape[:-1], w.shape[0])


def _backward(
    needs_grad: Sequence[bool],
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tensors: Sequence[torch.Tensor],
    fan_in_fan_out: bool,
    identity: bool,
    dtype: torch.dtype,
    scalings: tuple[float, ...],
) -> tuple[torch.Tensor | None, ...]:
    needs_x, needs_weight, needs_bias = needs_grad[:3]
    needs_factors = needs_grad[7:]
    factors = _pack(tensors, scalings)
    w = weight.t() if fan_in_fan_out else weight
    grad_y2d = grad_y.reshape(-1, w.shape[0])
    if is_chunked(w, factors) and not needs_weight:
        grad_x, grad_factors = _backward_chunked(needs_x, needs_factors, grad_y2d, x, w, factors, identity, dtype)
        grad_bias = grad_y2d.sum(0).to(bias.dtype) if needs_bias and bias is not None else None
        return grad_x, None, grad_bias, None, None, None, None, *grad_factors

    grad_x = grad_weight = grad_bias = None
    if needs_x:
        effective = scaled_weight(w, factors, identity=identity, dtype=dtype)
        grad_x = torch.matmul(grad_y, effective).to(x.dtype)
        del effective  # one m×n tensor at a time: the product below is the next
    if needs_bias and bias is not None:
        grad_bias = grad_y2d.sum(0).to(bias.dtype)

    grad_factors = [None] * len(tensors)
    if needs_weight or any(needs_factors):
        x2d = x.reshape(-1, w.shape[1]).to(dtype)
        # in the memory layout of the weight, so that the elementwise pass below walks both alike
        product = (x2d.t() @ grad_y2d).t() if fan_in_fan_out else grad_y2d.t() @ x2d
        for i, f in enumerate(factors):
            if needs_factors[2 * i] or needs_factors[2 * i + 1]:
                grad_factors[2 * i : 2 * i + 2] = factor_gradients(product, w, f)
        if needs_weight:
            # d/dW of W ⊙ factor is product ⊙ factor, so the same function serves with the product in W's place
            grad_weight = scaled_weight(product, factors, identity=identity, dtype=weight.dtype)
            grad_weight = grad_weight.t() if fan_in_fan_out else grad_weight
    return grad_x, grad_weight, grad_bias, None, None, None, None, *grad_factors


def _backward_chunked(
    needs_x: bool,
    needs_factors: Sequence[bool],
    grad_y2d: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    factors: Sequence[Factors],
    identity: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """The gradients of x and of the factors, chunk by chunk of rows: neither W' nor gyᵀ x exists as a whole."""
    x2d = x.reshape(-1, w.shape[1]).to(dtype)
    totals = [
        FactorGradients(f, w, compute_dtype(w, f.A, f.B)) if needs_factors[2 * i] or needs_factors[2 * i + 1] else None
        for i, f in enumerate(factors)
    ]
    # the parts of the sum over rows are added up in float32, so that a long sum is not rounded once a chunk
    grad_x = torch.zeros(x2d.shape, dtype=compute_dtype(x2d)) if needs_x else None
    for rows, chunk in scaled_weight_chunks(w, factors, identity, dtype):
        grad_rows = grad_y2d[:, rows]
        if grad_x is not None:
            if grad_x.dtype == dtype:
                grad_x.addmm_(grad_rows, chunk)
            else:
                grad_x.add_(grad_rows @ chunk)
        if any(total is not None for total in totals):
            product = grad_rows.t() @ x2d
            for total in totals:
                if total is not None:
                    total.add(rows, product)
    grads: list[torch.Tensor | None] = []
    for total in totals:
        grads.extend(total.result() if total is not None else (None, None))
    return None if grad_x is None else grad_x.view(x.shape).to(x.dtype), grads


def _differentiable_backward(
    ctx: Any,
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tensors: Sequence[torch.Tensor],
) -> tuple[torch.Tensor | None, ...]:
    """The same gradients through plain operations, for `create_graph=True`."""
    fan_in_fan_out, identity, dtype, scalings = ctx.settings
    inputs = (x, weight, bias, None, None, None, None, *tensors)
    w = weight.t() if fan_in_fan_out else weight
    effective = _scaled_weight_composite(w, _pack(tensors, scalings), identity, dtype)
    y = F.linear(x.to(dtype), effective, None if bias is None else bias.to(dtype))
    wanted = [t for t, needs in zip(inputs, ctx.needs_input_grad, strict=True) if needs and t is not None]
    grads = iter(torch.autograd.grad(y, wanted, grad_y, create_graph=True))
    return tuple(
        next(grads) if needs and t is not None else None for t, needs in zip(inputs, ctx.needs_input_grad, strict=True)
    )


def _pack(tensors: Sequence[torch.Tensor], scalings: Sequence[float]) -> list[Factors]:
    return [Factors(tensors[2 * i], tensors[2 * i + 1], s) for i, s in enumerate(scalings)]


def _autocast_off(device_type: str) -> AbstractContextManager[Any]:
    # dtypes are chosen above; autocast would cast float32 products of small factors again
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
