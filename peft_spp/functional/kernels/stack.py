# SPDX-License-Identifier: Apache-2.0
"""
A stack of weights, such as the experts of a mixture: each is a layer of its own, with row blocks of its own.

Where the row blocks of one layer end where those of the next begin, which they do if all blocks are equally long, the
stack is one tall weight to a backend. Otherwise, and where layers are stored `(in, out)`, they are walked one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..factors import Factors
from .backend import KernelBackend
from .scaled import ScaledWeight


def scaled_weight(
    backend: KernelBackend, weight: torch.Tensor, factors: Sequence[Factors], identity: bool, dtype: torch.dtype
) -> torch.Tensor:
    """W' of all layers, in the memory layout of the `(E, m, n)` stack."""
    out = torch.empty_like(weight, dtype=dtype)
    for part, (layer, target) in walk_layers(factors, weight, out):
        backend.scaled_weight(ScaledWeight(layer, part, identity, dtype), out=target)
    return out


def factor_gradients(
    backend: KernelBackend, grad: torch.Tensor, weight: torch.Tensor, factors: Sequence[Factors]
) -> list[torch.Tensor]:
    """The gradients of A and B of each adapter, given that of W', shape `(E, m, n)`."""
    parts = [
        [one for pair in backend.factor_gradients(product, layer, part) for one in pair]
        for part, (layer, product) in walk_layers(factors, weight, grad)
    ]
    return [torch.cat(grads) if len(grads) > 1 else grads[0] for grads in zip(*parts, strict=True)]


def walk_layers(
    factors: Sequence[Factors], *stacks: torch.Tensor
) -> Iterator[tuple[list[Factors], tuple[torch.Tensor, ...]]]:
    """Cut stacks of one shape into matrices, and the factors with them."""
    layers, rows, _ = stacks[0].shape
    ranks = [A.shape[0] // layers for A, _, _ in factors]
    if all(rows % r == 0 for r in ranks) and all(stack.is_contiguous() for stack in stacks):
        yield list(factors), tuple(stack.flatten(0, 1) for stack in stacks)
        return
    for index in range(layers):
        part = [
            Factors(A[index * r : (index + 1) * r], B[index * rows : (index + 1) * rows], s)
            for (A, B, s), r in zip(factors, ranks, strict=True)
        ]
        yield part, tuple(stack[index] for stack in stacks)
