# SPDX-License-Identifier: Apache-2.0
"""
The operators `torch.ops.peft_spp.*`: one schema, and a backend for each kind of device.

`torch.compile` takes each of them as one node, so a compiled model runs the same kernels, with the same results, as an
eager one. Another device's backend is a module like `triton`, with `scaled_weight` and `factor_gradients`, or one like
`cpu`, with `linear` and `linear_backward` of its own, and a line in `_BACKENDS`. Where there is none, `composite`
serves.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import ModuleType

import torch
from torch.library import Library, register_fake

from ..factors import Factors
from . import by_activation, by_weight, composite, cpu, stack, triton


_library = Library("peft_spp", "DEF")
_library.define(
    "scaled_weight(Tensor weight, Tensor[] A, Tensor[] B, float[] scaling, bool identity, ScalarType dtype) -> Tensor"
)
# the gradients that are needed, given that of W': weight, then A and B of each adapter
_library.define(
    "scaled_weight_backward(Tensor grad, Tensor weight, Tensor[] A, Tensor[] B, float[] scaling, bool identity, "
    "bool needs_weight, bool needs_factors) -> Tensor[]"
)
_library.define(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor[] A, Tensor[] B, float[] scaling, bool fan_in_fan_out, "
    "bool identity, ScalarType dtype) -> Tensor"
)
# the gradients that are needed, in this order: x, weight, then A and B of each adapter
_library.define(
    "linear_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor[] A, Tensor[] B, float[] scaling, "
    "bool fan_in_fan_out, bool identity, ScalarType dtype, bool needs_x, bool needs_weight, bool needs_factors) "
    "-> Tensor[]"
)
# The same for a weight that is the caller's to give away, one just dequantized: W' may be written over it.
_library.define(
    "linear_in_place(Tensor x, Tensor(a!) weight, Tensor? bias, Tensor[] A, Tensor[] B, float[] scaling, "
    "bool identity, ScalarType dtype) -> Tensor"
)
_library.define(
    "linear_in_place_backward(Tensor grad_y, Tensor x, Tensor(a!) weight, Tensor[] A, Tensor[] B, float[] scaling, "
    "bool identity, ScalarType dtype, bool needs_x, bool needs_factors) -> Tensor[]"
)


def pack(A: Sequence[torch.Tensor], B: Sequence[torch.Tensor], scaling: Sequence[float]) -> list[Factors]:
    """The factors of each adapter, from one list for each of their parts."""
    return [Factors(a, b, s) for a, b, s in zip(A, B, scaling, strict=True)]


def _scaled_weight(
    backend: ModuleType,
    weight: torch.Tensor,
    A: list[torch.Tensor],
    B: list[torch.Tensor],
    scaling: list[float],
    identity: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    result: torch.Tensor
    if weight.dim() == 3:
        result = stack.scaled_weight(backend, weight, pack(A, B, scaling), identity, dtype)
    else:
        result = backend.scaled_weight(weight, pack(A, B, scaling), identity, dtype)
    return result


def _scaled_weight_backward(
    backend: ModuleType,
    grad: torch.Tensor,
    weight: torch.Tensor,
    A: list[torch.Tensor],
    B: list[torch.Tensor],
    scaling: list[float],
    identity: bool,
    needs_weight: bool,
    needs_factors: bool,
) -> list[torch.Tensor]:
    grads = []
    if needs_weight:
        # d/dW of W ⊙ factor is the gradient ⊙ factor, so the same function serves with the gradient in W's place
        grads.append(_scaled_weight(backend, grad, A, B, scaling, identity, weight.dtype))
    if needs_factors:
        if weight.dim() == 2:
            grad, weight = grad.unsqueeze(0), weight.unsqueeze(0)
        grads.extend(stack.factor_gradients(backend, grad, weight, pack(A, B, scaling)))
    return grads


def _linear(
    backend: ModuleType,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    A: list[torch.Tensor],
    B: list[torch.Tensor],
    scaling: list[float],
    fan_in_fan_out: bool,
    identity: bool,
    dtype: torch.dtype,
    overwrite: bool = False,
) -> torch.Tensor:
    w = weight.t() if fan_in_fan_out else weight
    factors = pack(A, B, scaling)
    tokens = x.numel() // max(w.shape[1], 1)
    if by_activation.is_cheaper(tokens, w, factors, dtype):
        return by_activation.linear(x, w, bias, factors, identity, dtype)
    by_its_weight = getattr(backend, "linear", None) or partial(by_weight.linear, backend, overwrite=overwrite)
    result: torch.Tensor = by_its_weight(x, w, bias, factors, identity, dtype)
    return result


def _linear_in_place(
    backend: ModuleType,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    A: list[torch.Tensor],
    B: list[torch.Tensor],
    scaling: list[float],
    identity: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    return _linear(backend, x, weight, bias, A, B, scaling, False, identity, dtype, overwrite=True)


def _linear_backward(
    backend: ModuleType,
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
    w = weight.t() if fan_in_fan_out else weight
    factors = pack(A, B, scaling)
    backward = getattr(backend, "linear_backward", None) or partial(by_weight.linear_backward, backend)
    grads: list[torch.Tensor] = backward(grad_y, x, w, factors, identity, dtype, needs_x, needs_factors)
    if needs_weight:
        # d/dW of W ⊙ factor is gyᵀx ⊙ factor, so the same function serves with the product in W's place
        product = grad_y.reshape(-1, w.shape[0]).t() @ x.reshape(-1, w.shape[1]).to(dtype)
        grad_w = backend.scaled_weight(product, factors, identity, weight.dtype)
        grads.insert(int(needs_x), grad_w.t().contiguous() if fan_in_fan_out else grad_w)
    return grads


def _linear_in_place_backward(
    backend: ModuleType,
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    A: list[torch.Tensor],
    B: list[torch.Tensor],
    scaling: list[float],
    identity: bool,
    dtype: torch.dtype,
    needs_x: bool,
    needs_factors: bool,
) -> list[torch.Tensor]:
    factors = pack(A, B, scaling)
    backward = getattr(backend, "linear_backward", None) or partial(by_weight.linear_backward, backend, overwrite=True)
    grads: list[torch.Tensor] = backward(grad_y, x, weight, factors, identity, dtype, needs_x, needs_factors)
    return grads


_BACKENDS: dict[str, ModuleType] = {"CompositeExplicitAutograd": composite, "CPU": cpu}
if triton.is_available():
    _BACKENDS.update(CUDA=triton, XPU=triton)
for _key, _backend in _BACKENDS.items():
    _library.impl("scaled_weight", partial(_scaled_weight, _backend), _key)
    _library.impl("scaled_weight_backward", partial(_scaled_weight_backward, _backend), _key)
    _library.impl("linear", partial(_linear, _backend), _key)
    _library.impl("linear_backward", partial(_linear_backward, _backend), _key)
    _library.impl("linear_in_place", partial(_linear_in_place, _backend), _key)
    _library.impl("linear_in_place_backward", partial(_linear_in_place_backward, _backend), _key)


@register_fake("peft_spp::scaled_weight")
def _(
    weight: torch.Tensor,
    A: list[torch.Tensor],
    B: list[torch.Tensor],
    scaling: list[float],
    identity: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    return torch.empty_like(weight, dtype=dtype)


@register_fake("peft_spp::scaled_weight_backward")
def _(
    grad: torch.Tensor,
    weight: torch.Tensor,
    A: list[torch.Tensor],
    B: list[torch.Tensor],
    scaling: list[float],
    identity: bool,
    needs_weight: bool,
    needs_factors: bool,
) -> list[torch.Tensor]:
    grads = [torch.empty_like(grad, dtype=weight.dtype)] if needs_weight else []
    if needs_factors:
        grads.extend(t.new_empty(t.shape) for pair in zip(A, B, strict=True) for t in pair)
    return grads


@register_fake("peft_spp::linear")
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    A: list[torch.Tensor],
    B: list[torch.Tensor],
    scaling: list[float],
    fan_in_fan_out: bool,
    identity: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1 if fan_in_fan_out else 0]), dtype=dtype)


@register_fake("peft_spp::linear_backward")
def _(
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
    grads = []
    if needs_x:
        grads.append(x.new_empty(x.shape))
    if needs_weight:
        grads.append(weight.new_empty(weight.shape))
    if needs_factors:
        grads.extend(t.new_empty(t.shape) for pair in zip(A, B, strict=True) for t in pair)
    return grads


@register_fake("peft_spp::linear_in_place")
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    A: list[torch.Tensor],
    B: list[torch.Tensor],
    scaling: list[float],
    identity: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


@register_fake("peft_spp::linear_in_place_backward")
def _(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
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
