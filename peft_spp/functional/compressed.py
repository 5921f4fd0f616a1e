# SPDX-License-Identifier: Apache-2.0
"""A linear layer whose weight is stored without its zeros, with or without SPP's factors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from .autograd import (
    autocast_off,
    autocasts,
    halves,
    is_followed,
    is_transformed,
    needed_gradients,
    needs_plain,
    records_gradients,
)
from .bitmask import Compressed
from .bitmask import decompress as plain_decompress
from .factors import Factors, check_factors, unpack
from .kernels import compressed_ops, plain
from .kernels.cpu.backend import cpu
from .kernels.cpu.bitmask import compress, expand
from .weight import scaled_weight


__all__ = ["compress", "compressed_linear", "compressed_weight", "decompress"]


def decompress(weight: Compressed) -> torch.Tensor:
    """
    The weight that was compressed, bit for bit.

    Args:
        weight ([`Compressed`]): The weight, shape `(..., m, n)`; see [`check_compressed`] for one from a file.

    Returns:
        `torch.Tensor`: In the shape of the weight, contiguous.
    """
    if weight.values.is_meta:
        return weight.values.new_empty(weight.shape)
    if is_transformed():  # whose tensors have no address
        return plain_decompress(weight)
    return expand(weight).view(weight.shape)


def check_frozen(weight: Compressed) -> None:
    """Refuse a weight that is to get a gradient: it would get none, and silently stay as it is."""
    if records_gradients(weight.values):
        raise ValueError(
            "a compressed weight is frozen, and this one has requires_grad=True: set that to False and train an "
            "adapter, or make the model dense with peft_spp.decompress(model)"
        )


def compressed_linear(
    x: torch.Tensor,
    weight: Compressed,
    bias: torch.Tensor | None = None,
    factors: Sequence[Factors] = (),
    *,
    identity: bool = True,
) -> torch.Tensor:
    """
    [`spp_linear`] for a weight without its zeros: `x @ W'.T + bias` with W' = W ⊙ (1 + Σ s · P(A) ⊙ B).

    For few tokens, as in generation, the values are read as they are, and W' is never made. For many tokens W' is made
    chunk by chunk (on CPU) or whole, used, and dropped; it is made again in the backward pass. Only `x`, the factors
    and the compressed weight itself are kept in between.

    Args:
        x (`torch.Tensor`): Input, shape `(*, n)`, of the weight's dtype unless autocast is on.
        weight ([`Compressed`]): W, shape `(m, n)`. It is frozen.
        bias (`torch.Tensor`, *optional*): shape `(m,)`.
        factors (`Sequence[Factors]`, *optional*): The factors of each active adapter; without any, W' is W.
        identity (`bool`): With `False` the 1 is left out: the result is what the adapters add to the base layer.

    Returns:
        `torch.Tensor`: shape `(*, m)`, in the dtype of the matmul.

    Raises:
        ValueError: If the shapes of the factors do not fit the weight, or its values are to get a gradient.
    """
    check_frozen(weight)
    device_type = x.device.type
    dtype = weight.values.dtype
    if autocasts(device_type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
    elif x.dtype != dtype:
        # what nn.Linear says of such a call
        raise RuntimeError(f"mat1 and mat2 must have the same dtype, but got {x.dtype} and {dtype}")
    if x.shape[-1] != weight.columns:
        raise RuntimeError(
            f"mat1 and mat2 shapes cannot be multiplied ({x.shape[:-1].numel()}x{x.shape[-1]} and "
            f"{weight.columns}x{weight.shape[0]})"
        )
    check_factors(weight, factors)
    A, B, scaling = unpack(factors)
    with autocast_off(device_type):
        if needs_plain(x, bias, *A, *B):
            # where it is exported, the weight has no address
            dense = decompress(weight) if is_transformed() else compressed_weight(weight)
            return plain.linear(scaling, False, identity, dtype, x, dense, bias, *A, *B)
        if not records_gradients(x, bias, *A, *B):
            return _forward(x, weight, bias, A, B, scaling, identity, dtype)
        result: torch.Tensor = _CompressedLinear.apply(x, *weight, bias, identity, dtype, scaling, *A, *B)
        return result


def compressed_weight(
    weight: Compressed, factors: Sequence[Factors] = (), *, identity: bool = True, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """
    W' as a dense tensor, differentiable in the factors; see [`scaled_weight`].

    Args:
        weight ([`Compressed`]): W, shape `(m, n)` or `(E, m, n)`.
        factors (`Sequence[Factors]`, *optional*): The factors of each active adapter; without any, W' is W.
        identity (`bool`): Whether to include the 1.
        dtype (`torch.dtype`, *optional*): The dtype of the result, by default that of the weight.

    Returns:
        `torch.Tensor`: A new tensor, contiguous.

    Raises:
        ValueError: If the shapes of the factors do not fit.
    """
    check_factors(weight, factors)
    A, B, scaling = unpack(factors)
    if is_transformed() or records_gradients(*A, *B) or len(weight.shape) != 2:
        dense = decompress(weight)
        return scaled_weight(dense, factors, identity=identity, dtype=dtype) if factors else dense
    result: torch.Tensor = torch.ops.peft_spp.compressed_weight(
        *weight, A, B, scaling, identity, dtype or weight.values.dtype
    )
    return result


def _forward(
    x: torch.Tensor,
    weight: Compressed,
    bias: torch.Tensor | None,
    A: list[torch.Tensor],
    B: list[torch.Tensor],
    *args: Any,
) -> torch.Tensor:
    if x.is_cpu and not is_followed(x, weight.values, bias, *A, *B):
        return compressed_ops.linear(cpu, x, *weight, bias, A, B, *args)
    result: torch.Tensor = torch.ops.peft_spp.compressed_linear(x, *weight, bias, A, B, *args)
    return result


class _CompressedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        values: torch.Tensor,
        bitmask: torch.Tensor,
        row_offsets: torch.Tensor,
        columns: int,
        bias: torch.Tensor | None,
        identity: bool,
        dtype: torch.dtype,
        scaling: list[float],
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        # the parameters themselves are saved, and x as it came: see `_SPPLinear`
        ctx.save_for_backward(x, values, bitmask, row_offsets, bias, *tensors)
        ctx.columns = columns
        ctx.settings = (scaling, identity, dtype)
        weight = Compressed(values, bitmask, row_offsets, columns)
        return _forward(x, weight, bias, *halves(tensors), *ctx.settings)

    @staticmethod
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, values, bitmask, row_offsets, bias, *tensors = ctx.saved_tensors
        weight = Compressed(values, bitmask, row_offsets, ctx.columns)
        with autocast_off(grad_y.device.type):
            if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or is_transformed()):
                return _plain_backward(ctx, grad_y, x, weight, bias, tensors)
            needs_x, needs_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[5]
            needs_factors = any(ctx.needs_input_grad[9:])
            pairs: list[torch.Tensor] = []
            if needs_x or needs_factors:
                pairs = list(
                    torch.ops.peft_spp.compressed_linear_backward(
                        grad_y, x, *weight, *halves(tensors), *ctx.settings, needs_x, needs_factors
                    )
                )
            grad_x = pairs.pop(0) if needs_x else None
            grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0).to(bias.dtype) if needs_bias else None
            # they come adapter by adapter, A and then B; the inputs are all A and then all B
            grads = [*pairs[::2], *pairs[1::2]] if needs_factors else [None] * len(tensors)
            return (grad_x, None, None, None, None, grad_bias, None, None, None, *grads)


def _plain_backward(
    ctx: Any,
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: Compressed,
    bias: torch.Tensor | None,
    tensors: Sequence[torch.Tensor],
) -> tuple[torch.Tensor | None, ...]:
    """The same gradients through plain operations, for `create_graph=True` and inside transforms."""
    scaling, identity, dtype = ctx.settings
    needs = [ctx.needs_input_grad[0], False, ctx.needs_input_grad[5], *ctx.needs_input_grad[9:]]
    compute = partial(plain.linear, scaling, False, identity, dtype)
    inputs = (x, decompress(weight), bias, *tensors)
    grad_x, _, grad_bias, *grads = needed_gradients(needs, inputs, compute, grad_y)
    return (grad_x, None, None, None, None, grad_bias, None, None, None, *grads)
