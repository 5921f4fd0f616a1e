# SPDX-License-Identifier: Apache-2.0
"""The trainable part of an SPP adapter on one layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .bitmask import Compressed
from .row_blocks import check_row_blocks


class Factors(NamedTuple):
    """The trainable part of one SPP adapter on one layer, or on a stack of E layers, such as the experts of a mixture.

    Args:
        A (`torch.Tensor`):
            The input factor, shape `(r, n)`: one row for each block of output rows. For a stack `(E·r, n)`, the rows
            of one layer after those of another.
        B (`torch.Tensor`): The output factor, shape `(m, 1)`; for a stack `(E·m, 1)`.
        scaling (`float` or `torch.Tensor`):
            s = alpha / r. As a tensor without dimensions, on the device of the factors, it can change without anything
            being compiled again.
    """

    A: torch.Tensor
    B: torch.Tensor
    scaling: float | torch.Tensor


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """The dtype that products of factors and weights are computed in: float64 if any input is, otherwise float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def unpack(factors: Sequence[Factors]) -> tuple[list[torch.Tensor], list[torch.Tensor], list[float]]:
    """
    A, B and s of each adapter, as the kernels take them: with s a number. Where it is a tensor, B is multiplied by it
    and s is 1: the same bits, since the kernels multiply B by s first, too, unless the weight alone is float64.
    """
    numbered = [
        Factors(A, B.to(compute_dtype(A, B)) * s, 1.0) if isinstance(s, torch.Tensor) else Factors(A, B, float(s))
        for A, B, s in factors
    ]
    return [f.A for f in numbered], [f.B for f in numbered], [float(f.scaling) for f in numbered]


def check_factors(weight: torch.Tensor | Compressed, factors: Sequence[Factors]) -> None:
    """Raise a `ValueError` if the shapes of the factors do not fit the `(m, n)` weight or `(E, m, n)` stack."""
    if len(weight.shape) == 3:
        check_stack(weight, factors)
        return
    m, n = weight.shape
    for A, B, _ in factors:
        if A.ndim != 2 or A.shape[1] != n or B.shape != (m, 1):
            raise ValueError(
                f"Factors of shape A {tuple(A.shape)} and B {tuple(B.shape)} do not fit a weight of shape {(m, n)}: "
                f"A must be (r, {n}) and B ({m}, 1)."
            )
        check_row_blocks(m, A.shape[0])


def check_stack(stack: torch.Tensor | Compressed, factors: Sequence[Factors], inputs_first: bool = False) -> None:
    """[`check_factors`] of an `(E, m, n)` stack, or of one that has its weights as `(n, m)`."""
    layers, m, n = stack.shape
    _check_stack_factors((layers, n, m) if inputs_first else (layers, m, n), factors)


def factors_of_each(factors: Sequence[Factors], layers: int) -> list[list[Factors]]:
    """The factors of each layer of a stack. They are cut at once, so that their gradients are put together at once."""
    cut = [(A.unflatten(0, (layers, -1)).unbind(), B.unflatten(0, (layers, -1)).unbind(), s) for A, B, s in factors]
    return [[Factors(A[index], B[index], s) for A, B, s in cut] for index in range(layers)]


def _check_stack_factors(shape: tuple[int, int, int], factors: Sequence[Factors]) -> None:
    layers, m, n = shape
    for A, B, _ in factors:
        if A.ndim != 2 or A.shape[1] != n or A.shape[0] % layers or B.shape != (layers * m, 1):
            raise ValueError(
                f"Factors of shape A {tuple(A.shape)} and B {tuple(B.shape)} do not fit a stack of weights of shape "
                f"{(layers, m, n)}: A must be ({layers}·r, {n}) and B ({layers * m}, 1)."
            )
        check_row_blocks(m, A.shape[0] // layers)
