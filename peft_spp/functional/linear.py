# SPDX-License-Identifier: Apache-2.0
"""A linear layer with an SPP-scaled weight, as one autograd Function."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from .autograd import autocast_off, autocasts, halves, is_transformed, needed_gradients, needs_plain, records_gradients
from .factors import Factors, check_factors, unpack
from .kernels import plain


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

    One matmul forward and two backward: the forward pass makes W' and keeps nothing of its size, the backward pass
    makes it again for the gradient of `x` and reduces `(gyᵀ x) ⊙ W` to the gradients of A and B. Between the two only
    `x` and the parameters themselves are kept. For few tokens, as in generation, the forward pass leaves W as it is
    and multiplies the activations instead. Inside autocast the matmuls run in autocast's dtype.

    Rounding: W' is computed in float32 (float64 if any input is float64) and rounded once to the matmul's dtype; so is
    `A ⊙ x` where the activations are multiplied. gyᵀx is rounded once to that dtype, and the sums over it are float32.

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
    if autocasts(device_type) and torch.float64 not in (x.dtype, weight.dtype):
        dtype = torch.get_autocast_dtype(device_type)
    elif x.dtype != dtype:
        # what nn.Linear says of such a call
        raise RuntimeError(f"mat1 and mat2 must have the same dtype, but got {x.dtype} and {dtype}")
    check_factors(weight.t() if fan_in_fan_out else weight, factors)
    A, B, scaling = unpack(factors)
    with autocast_off(device_type):
        if needs_plain(x, weight, bias, *A, *B):
            return plain.linear(scaling, fan_in_fan_out, identity, dtype, x, weight, bias, *A, *B)
        if not records_gradients(x, weight, bias, *A, *B):
            return _forward(x, weight, bias, A, B, scaling, fan_in_fan_out, identity, dtype)
        return _SPPLinear.apply(x, weight, bias, fan_in_fan_out, identity, dtype, scaling, *A, *B)


def _forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *args: Any) -> torch.Tensor:
    result: torch.Tensor = torch.ops.peft_spp.linear(x, weight, bias, *args)
    return result


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
        scaling: list[float],
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        # The parameters themselves are saved, not views or casts of them: sharded training may free and gather their
        # storage between forward and backward. x is saved as it came, so that layers that share it share one copy.
        ctx.save_for_backward(x, weight, bias, *tensors)
        ctx.settings = (scaling, fan_in_fan_out, identity, dtype)
        return _forward(x, weight, bias, *halves(tensors), *ctx.settings)

    @staticmethod
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias, *tensors = ctx.saved_tensors
        with autocast_off(grad_y.device.type):
            if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or is_transformed()):
                return _plain_backward(ctx, grad_y, x, weight, bias, tensors)
            needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
            needs_factors = any(ctx.needs_input_grad[7:])
            grads = iter(
                torch.ops.peft_spp.linear_backward(
                    grad_y, x, weight, *halves(tensors), *ctx.settings, needs_x, needs_weight, needs_factors
                )
            )
            grad_x = next(grads) if needs_x else None
            grad_weight = next(grads) if needs_weight else None
            grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0).to(bias.dtype) if needs_bias else None
            # they come adapter by adapter, A and then B; the inputs are all A and then all B
            pairs = list(grads)
            return (
                grad_x,
                grad_weight,
                grad_bias,
                None,
                None,
                None,
                None,
                *([*pairs[::2], *pairs[1::2]] if needs_factors else [None] * len(tensors)),
            )


def _plain_backward(
    ctx: Any,
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tensors: Sequence[torch.Tensor],
) -> tuple[torch.Tensor | None, ...]:
    """The same gradients through plain operations, for `create_graph=True` and inside transforms."""
    needs = [*ctx.needs_input_grad[:3], *ctx.needs_input_grad[7:]]
    grads = needed_gradients(needs, (x, weight, bias, *tensors), partial(plain.linear, *ctx.settings), grad_y)
    return (*grads[:3], None, None, None, None, *grads[3:])
