# SPDX-License-Identifier: Apache-2.0
"""
The operators `torch.ops.peft_spp.*`: one schema, and a backend for each kind of device.

`torch.compile` takes each of them as one node, so a compiled model runs the same kernels, with the same results, as an
eager one. Another device's kernels are a [`KernelBackend`] and a line in `BACKENDS`; `compressed_ops` has the
operators for weights without their zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.library import Library, register_fake

from ..factors import Factors
from . import stack
from .backend import KernelBackend
from .composite import composite
from .cpu.backend import cpu
from .scaled import ScaledWeight
from .triton import is_available, triton


BACKENDS: dict[str, KernelBackend] = {"CompositeExplicitAutograd": composite, "CPU": cpu}
"""The backend of each dispatch key."""
if is_available():
    BACKENDS.update(CUDA=triton, XPU=triton)

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
"""What each operator runs on a backend, which it takes first, by the operator's full name."""

_library = Library("peft_spp", "DEF")
_FACTORS = "Tensor[] A, Tensor[] B, float[] scaling"
_library.define(f"scaled_weight(Tensor weight, {_FACTORS}, bool identity, ScalarType dtype) -> Tensor")
# the gradients that are needed, given that of W': weight, then A and B of each adapter
_library.define(
    f"scaled_weight_backward(Tensor grad, Tensor weight, {_FACTORS}, bool identity, bool needs_weight, "
    "bool needs_factors) -> Tensor[]"
)
_library.define(
    f"linear(Tensor x, Tensor weight, Tensor? bias, {_FACTORS}, bool fan_in_fan_out, bool identity, ScalarType dtype) "
    "-> Tensor"
)
# the gradients that are needed, in this order: x, weight, then A and B of each adapter
_library.define(
    f"linear_backward(Tensor grad_y, Tensor x, Tensor weight, {_FACTORS}, bool fan_in_fan_out, bool identity, "
    "ScalarType dtype, bool needs_x, bool needs_weight, bool needs_factors) -> Tensor[]"
)


def pack(A: Sequence[torch.Tensor], B: Sequence[torch.Tensor], scaling: Sequence[float]) -> list[Factors]:
    """The factors of each adapter, from one list for each of their parts."""
    return [Factors(a, b, s) for a, b, s in zip(A, B, scaling, strict=True)]


def backend_of(tensor: torch.Tensor) -> KernelBackend:
    return BACKENDS.get(tensor.device.type.upper(), composite)


def implement(library: Library, functions: dict[str, Callable[..., Any]]) -> None:
    """Give operators an implementation on every backend."""
    IMPLEMENTATIONS.update({f"{library.ns}::{name}": function for name, function in functions.items()})
    for key, backend in BACKENDS.items():
        for name, function in functions.items():
            library.impl(name, partial(function, backend), key)


def _scaled_weight(
    backend: KernelBackend,
    weight: torch.Tensor,
    A: list[torch.Tensor],
    B: list[torch.Tensor],
    scaling: list[float],
    identity: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    factors = pack(A, B, scaling)
    if weight.dim() == 3:
        return stack.scaled_weight(backend, weight, factors, identity, dtype)
    return backend.scaled_weight(ScaledWeight(weight, factors, identity, dtype))


def _scaled_weight_backward(
    backend: KernelBackend,
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
    backend: KernelBackend,
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
    w = weight.t() if fan_in_fan_out else weight
    return backend.linear(x, ScaledWeight(w, pack(A, B, scaling), identity, dtype), bias)


def _linear_backward(
    backend: KernelBackend,
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
    w = ScaledWeight(weight.t() if fan_in_fan_out else weight, pack(A, B, scaling), identity, dtype)
    grads = backend.linear_backward(grad_y, x, w, needs_x, needs_factors)
    if needs_weight:
        # d/dW of W ⊙ factor is gyᵀx ⊙ factor, so the same function serves with the product in W's place
        m, n = w.dense.shape
        product = grad_y.reshape(-1, m).t() @ x.reshape(-1, n).to(dtype)
        grad_w = backend.scaled_weight(w._replace(weight=product, dtype=weight.dtype))
        grads.insert(int(needs_x), grad_w.t().contiguous() if fan_in_fan_out else grad_w)
    return grads


implement(
    _library,
    {
        "scaled_weight": _scaled_weight,
        "scaled_weight_backward": _scaled_weight_backward,
        "linear": _linear,
        "linear_backward": _linear_backward,
    },
)


# what follows the tensors that a result is shaped like is only looked at from its end
@register_fake("peft_spp::scaled_weight")
def _(weight: torch.Tensor, *settings: Any) -> torch.Tensor:
    *_, dtype = settings
    return torch.empty_like(weight, dtype=dtype)


@register_fake("peft_spp::scaled_weight_backward")
def _(
    grad: torch.Tensor, weight: torch.Tensor, A: list[torch.Tensor], B: list[torch.Tensor], *settings: Any
) -> list[torch.Tensor]:
    *_, needs_weight, needs_factors = settings
    grads = [torch.empty_like(grad, dtype=weight.dtype)] if needs_weight else []
    return grads + (like_factors(A, B) if needs_factors else [])


@register_fake("peft_spp::linear")
def _(x: torch.Tensor, weight: torch.Tensor, *settings: Any) -> torch.Tensor:
    *_, fan_in_fan_out, _identity, dtype = settings
    return x.new_empty((*x.shape[:-1], weight.shape[1 if fan_in_fan_out else 0]), dtype=dtype)


@register_fake("peft_spp::linear_backward")
def _(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    A: list[torch.Tensor],
    B: list[torch.Tensor],
    *settings: Any,
) -> list[torch.Tensor]:
    *_, needs_x, needs_weight, needs_factors = settings
    grads = [x.new_empty(x.shape)] if needs_x else []
    if needs_weight:
        grads.append(weight.new_empty(weight.shape))
    return grads + (like_factors(A, B) if needs_factors else [])


def like_factors(A: Sequence[torch.Tensor], B: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Empty gradients of A and B of each adapter."""
    return [t.new_empty(t.shape) for pair in zip(A, B, strict=True) for t in pair]
