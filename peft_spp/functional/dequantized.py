# SPDX-License-Identifier: Apache-2.0
"""A linear layer with an SPP-scaled weight that is dequantized when it is needed and never kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import is_fake

from .autograd import autocast_off, autocasts, halves, is_transformed, needed_gradients, needs_plain, records_gradients
from .factors import Factors, check_factors, unpack
from .kernels import plain
from .kernels.backend import KernelBackend
from .kernels.ops import backend_of, pack
from .kernels.scaled import ScaledWeight


def spp_linear_dequantized(
    x: torch.Tensor,
    dequantize: Callable[[], torch.Tensor],
    bias: torch.Tensor | None,
    factors: Sequence[Factors],
    *,
    identity: bool = True,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """
    [`spp_linear`] for a weight that is stored in another form, such as quantized: W' = W ⊙ (1 + Σ s · P(A) ⊙ B).

    The dense weight is made once in the forward pass and once in the backward pass, and dropped after each: only `x`
    and the factors are kept in between. On an accelerator W' is built in the buffer of the dense weight, if that has
    the matmul's dtype; on CPU it is built chunk by chunk next to it. W' is computed in float32 (float64 if any input
    is float64) and rounded once.

    Args:
        x (`torch.Tensor`): Input, shape `(*, n)`.
        dequantize (`Callable[[], torch.Tensor]`): Makes W, shape `(m, n)`, the same at every call, in a tensor of its
            own, which is overwritten.
        bias (`torch.Tensor`, *optional*): shape `(m,)`.
        factors (`Sequence[Factors]`): The factors of each active adapter; any floating dtype.
        identity (`bool`): With `False` the 1 is left out: the result is what the adapters add to the base layer.
        dtype (`torch.dtype`, *optional*):
            The dtype of the matmuls, by default that of `x`; inside autocast they run in autocast's dtype.

    Returns:
        `torch.Tensor`: shape `(*, m)`, in the dtype of the matmul.

    Raises:
        ValueError: If the shapes of the factors do not fit the weight.
    """
    dtype = dtype or x.dtype
    if autocasts(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    A, B, scaling = unpack(factors)
    tensors = [*A, *B]
    with autocast_off(x.device.type):
        if needs_plain(x, bias, *tensors):
            weight = dequantize()
            check_factors(weight, pack(A, B, scaling))
            return plain.linear(scaling, False, identity, dtype, x, weight, bias, *tensors)
        if not records_gradients(x, bias, *tensors):
            return _forward(x, dequantize, bias, identity, dtype, scaling, tensors)
        result: torch.Tensor = _SPPLinearDequantized.apply(x, dequantize, bias, identity, dtype, scaling, *tensors)
        return result


def _forward(
    x: torch.Tensor,
    dequantize: Callable[[], torch.Tensor],
    bias: torch.Tensor | None,
    identity: bool,
    dtype: torch.dtype,
    scaling: list[float],
    tensors: Sequence[torch.Tensor],
) -> torch.Tensor:
    A, B = halves(tensors)
    weight = dequantize()
    factors = pack(A, B, scaling)
    check_factors(weight, factors)
    backend = _overwriting_backend(weight)
    if backend is not None:
        return backend.linear(x, ScaledWeight(weight, factors, identity, dtype), bias, overwrite=True)
    result: torch.Tensor = torch.ops.peft_spp.linear(x, weight, bias, A, B, scaling, False, identity, dtype)
    return result


def _overwriting_backend(weight: torch.Tensor) -> KernelBackend | None:
    """
    The backend that makes W' in the buffer of the dense weight, which no operator can be asked to do: the compiler
    takes none that writes to an argument and returns a list. On CPU the weight is walked in chunks as it is.
    """
    is_traced = torch.compiler.is_compiling() or is_fake(weight)
    return None if is_traced or weight.device.type == "cpu" else backend_of(weight)


class _SPPLinearDequantized(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dequantize: Callable[[], torch.Tensor],
        bias: torch.Tensor | None,
        identity: bool,
        dtype: torch.dtype,
        scaling: list[float],
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        # x is saved as it came, so that layers that share it share one copy
        ctx.save_for_backward(x, bias, *tensors)
        ctx.dequantize = dequantize
        ctx.settings = (scaling, identity, dtype)
        return _forward(x, dequantize, bias, identity, dtype, scaling, tensors)

    @staticmethod
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, bias, *tensors = ctx.saved_tensors
        needs_x, _, needs_bias = ctx.needs_input_grad[:3]
        needs_factors = any(ctx.needs_input_grad[6:])
        with autocast_off(grad_y.device.type):
            if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or is_transformed()):
                return _plain_backward(ctx, grad_y, x, bias, tensors)
            grad_x: torch.Tensor | None = None
            pairs: list[torch.Tensor] = []
            if needs_x or needs_factors:
                pairs = _backward(grad_y, x, ctx.dequantize(), tensors, ctx.settings, needs_x, needs_factors)
            if needs_x:
                grad_x, *pairs = pairs
            grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0).to(bias.dtype) if needs_bias else None
            # they come adapter by adapter, A and then B; the inputs are all A and then all B
            grads = [*pairs[::2], *pairs[1::2]] if needs_factors else [None] * len(tensors)
            return (grad_x, None, grad_bias, None, None, None, *grads)


def _backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    settings: tuple[list[float], bool, torch.dtype],
    needs_x: bool,
    needs_factors: bool,
) -> list[torch.Tensor]:
    A, B = halves(tensors)
    scaling, identity, dtype = settings
    backend = _overwriting_backend(weight)
    if backend is not None:
        w = ScaledWeight(weight, pack(A, B, scaling), identity, dtype)
        return backend.linear_backward(grad_y, x, w, needs_x, needs_factors, overwrite=True)
    return list(
        torch.ops.peft_spp.linear_backward(
            grad_y, x, weight, A, B, scaling, False, identity, dtype, needs_x, False, needs_factors
        )
    )


def _plain_backward(
    ctx: Any, grad_y: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, tensors: Sequence[torch.Tensor]
) -> tuple[torch.Tensor | None, ...]:
    """The same gradients through plain operations, for `create_graph=True` and inside transforms."""
    scaling, identity, dtype = ctx.settings
    needs = [ctx.needs_input_grad[0], False, *ctx.needs_input_grad[2:3], *ctx.needs_input_grad[6:]]
    compute = partial(plain.linear, scaling, False, identity, dtype)
    grad_x, _, grad_bias, *grads = needed_gradients(needs, (x, ctx.dequantize(), bias, *tensors), compute, grad_y)
    return (grad_x, None, grad_bias, None, None, None, *grads)
