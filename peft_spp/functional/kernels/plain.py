# SPDX-License-Identifier: Apache-2.0
"""
The formulas in plain operations, which every transform of PyTorch knows: for `torch.func`, for forward-mode and
repeated differentiation, and for batched gradients.

They keep tensors of the weight's size for a backward pass, which the operators do not.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.library import Library, register_vmap

from ..autograd import halves, needed_gradients
from . import stack
from .composite import composite
from .ops import pack
from .scaled import ScaledWeight


def linear(
    scaling: list[float],
    fan_in_fan_out: bool,
    identity: bool,
    dtype: torch.dtype,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *tensors: torch.Tensor,
) -> torch.Tensor:
    """`torch.ops.peft_spp.linear`, with the tensors last: all A, and then all B."""
    w = weight.t() if fan_in_fan_out else weight
    effective = composite.scaled_weight(ScaledWeight(w, pack(*halves(tensors), scaling), identity, dtype))
    return F.linear(x.to(dtype), effective, None if bias is None else bias.to(dtype))


def scaled_weight(
    scaling: list[float], identity: bool, dtype: torch.dtype, weight: torch.Tensor, *tensors: torch.Tensor
) -> torch.Tensor:
    """`torch.ops.peft_spp.scaled_weight`, with the tensors last: all A, and then all B."""
    factors = pack(*halves(tensors), scaling)
    if weight.ndim == 2:
        return composite.scaled_weight(ScaledWeight(weight, factors, identity, dtype))
    parts = [
        composite.scaled_weight(ScaledWeight(layer, part, identity, dtype))
        for part, (layer,) in stack.walk_layers(factors, weight)
    ]
    return torch.stack(parts).reshape(weight.shape)


def _scaled_weight_backward(
    grad: torch.Tensor,
    weight: torch.Tensor,
    A: list[torch.Tensor],
    B: list[torch.Tensor],
    scaling: list[float],
    identity: bool,
    needs_weight: bool,
    needs_factors: bool,
) -> list[torch.Tensor]:
    tensors = (weight, *A, *B)
    needs = [needs_weight, *[needs_factors] * (len(tensors) - 1)]
    compute = partial(scaled_weight, scaling, identity, grad.dtype)
    return _in_order(needed_gradients(needs, tensors, compute, grad), 1)


def _linear_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    A: list[torch.Tensor],
    B: list[torch.Tensor],
    scaling: list[float],
    fan_in_fan_out: bool,
    identity: bool,
    dtype: torch.dtype,
    needs_x: bool,
    needs_weight: bool,
    needs_factors: bool,
) -> list[torch.Tensor]:
    tensors = (x, weight, None, *A, *B)
    needs = [needs_x, needs_weight, False, *[needs_factors] * (2 * len(A))]
    compute = partial(linear, scaling, fan_in_fan_out, identity, dtype)
    return _in_order(needed_gradients(needs, tensors, compute, grad_y), 3)


def _in_order(grads: tuple[torch.Tensor | None, ...], others: int) -> list[torch.Tensor]:
    """The gradients that are needed as the operators give them: of the factors adapter by adapter, A and then B."""
    factors = grads[others:]
    pairs = zip(factors[: len(factors) // 2], factors[len(factors) // 2 :], strict=True)
    return [grad for grad in (*grads[:others], *(one for pair in pairs for one in pair)) if grad is not None]


def _vmap(backward: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[list[torch.Tensor], int]:
    return torch.vmap(backward, in_dims, randomness=info.randomness)(*args), 0


_library = Library("peft_spp", "FRAGMENT")
for _name, _backward in {
    "scaled_weight_backward": _scaled_weight_backward,
    "linear_backward": _linear_backward,
}.items():
    register_vmap(f"peft_spp::{_name}", partial(_vmap, _backward), lib=_library)
    # what `is_grads_batched=True` makes of gradients is not a tensor of `torch.vmap`
    _library.impl(_name, _backward, "Batched")
