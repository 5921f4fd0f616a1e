# SPDX-License-Identifier: Apache-2.0
"""The effective weight W'."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from .autograd import autocast_off, halves, is_transformed, needed_gradients, needs_plain, records_gradients
from .factors import Factors, check_factors, unpack
from .kernels import plain


def scaled_weight(
    weight: torch.Tensor,
    factors: Sequence[Factors],
    *,
    identity: bool = True,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """
    W' = W ⊙ (1 + Σ s · P(A) ⊙ B), SPP's equation 4, or with `identity=False` only the update W ⊙ Σ s · P(A) ⊙ B.

    Computed in float32 (float64 if any input is float64) as `w + Σ s·b · (w·a)` and rounded once, to `dtype`. It is
    the weight that [`spp_linear`] multiplies by, bit for bit. It is differentiable; for the backward pass only the
    inputs are kept, nothing of the weight's size besides the weight itself.

    Args:
        weight (`torch.Tensor`):
            W, shape `(m, n)`, any strides; or a stack of weights `(E, m, n)`, each of which has row blocks of its own.
        factors (`Sequence[Factors]`): The factors of each active adapter; their updates add up.
        identity (`bool`): Whether to include the 1.
        dtype (`torch.dtype`, *optional*): The dtype of the result, by default that of `weight`.

    Returns:
        `torch.Tensor`: In the shape of `weight`, laid out in memory as `weight` is.

    Raises:
        ValueError: If the shapes of the factors do not fit.
    """
    check_factors(weight, factors)
    dtype = dtype or weight.dtype
    A, B, scaling = unpack(factors)
    result: torch.Tensor
    if needs_plain(weight, *A, *B):
        result = plain.scaled_weight(scaling, identity, dtype, weight, *A, *B)
    elif records_gradients(weight, *A, *B):
        result = _ScaledWeight.apply(weight, identity, dtype, scaling, *A, *B)
    else:
        result = torch.ops.peft_spp.scaled_weight(weight, A, B, scaling, identity, dtype)
    return result


class _ScaledWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        identity: bool,
        dtype: torch.dtype,
        scaling: list[float],
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(weight, *tensors)
        ctx.settings = (scaling, identity)
        result: torch.Tensor = torch.ops.peft_spp.scaled_weight(weight, *halves(tensors), scaling, identity, dtype)
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, *tensors = ctx.saved_tensors
        needs_weight, needs_factors = ctx.needs_input_grad[0], any(ctx.needs_input_grad[4:])
        with autocast_off(grad.device.type):
            if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or is_transformed()):
                return _plain_backward(ctx, grad, weight, tensors)
            grads = torch.ops.peft_spp.scaled_weight_backward(
                grad, weight, *halves(tensors), *ctx.settings, needs_weight, needs_factors
            )
        grad_weight = grads.pop(0) if needs_weight else None
        # they come adapter by adapter, A and then B; the inputs are all A and then all B
        grad_factors = [*grads[::2], *grads[1::2]] if needs_factors else [None] * len(tensors)
        return (grad_weight, None, None, None, *grad_factors)


def _plain_backward(
    ctx: Any, grad: torch.Tensor, weight: torch.Tensor, tensors: Sequence[torch.Tensor]
) -> tuple[torch.Tensor | None, ...]:
    """The same gradients through plain operations, for `create_graph=True` and inside transforms."""
    scaling, identity = ctx.settings
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[4:]]
    compute = partial(plain.scaled_weight, scaling, identity, grad.dtype)
    grad_weight, *grads = needed_gradients(needs, (weight, *tensors), compute, grad)
    return (grad_weight, None, None, None, *grads)
