# SPDX-License-Identifier: Apache-2.0
"""What is done to the elements of one weight: W' of a part of it, and the sums over gyᵀx."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from ...bitmask import Compressed
from ...factors import Factors, compute_dtype


class Elementwise(ABC):
    """
    Elementwise work on one weight and its factors, part by part.

    Args:
        weight (`torch.Tensor` or [`Compressed`]): W, shape `(m, n)`.
        factors (`Sequence[Factors]`): The factors of each active adapter.
    """

    def __init__(self, weight: torch.Tensor | Compressed, factors: Sequence[Factors]) -> None:
        self.weight: Any = weight
        self.factors = factors
        stored = weight.values if isinstance(weight, Compressed) else weight
        self.dtype = compute_dtype(stored, *(t for A, B, _ in factors for t in (A, B)))
        self.scaled_factors = [(A.to(self.dtype), B.to(self.dtype) * s) for A, B, s in factors]
        # a Conv1D weight comes as a transposed view: everything next to it is laid out alike, to be walked alike
        self.transposed = not isinstance(weight, Compressed) and weight.stride(0) < weight.stride(1)
        self._scratch: dict[str, torch.Tensor] = {}

    @abstractmethod
    def write_scaled(self, out: torch.Tensor, rows: slice, columns: slice, identity: bool) -> None:
        """
        Write W'[rows, columns] to `out`.

        Each element is `round(w + Σ s·b · (w·a))`, in float32 (float64 if an input is) up to the one rounding at the
        end. A pruned `+0.0` stays `+0.0` for any finite factors: `+0.0 + -0.0` is `+0.0`.
        """

    @abstractmethod
    def add_factor_gradients(self, product: torch.Tensor, rows: slice, columns: slice) -> None:
        """
        Add what `product`, (gyᵀ x)[rows, columns], contributes to [`factor_gradients`].

        With S = (gyᵀ x) ⊙ W that is `Σ_{i in block k} s·B[i] S[i]` for A[k], and `S[i] · P(A)[i]` for B[i]. gyᵀ x is
        rounded once to the dtype of the matmul; S and the sums are in float32 (float64 if an input is).
        """

    def factor_gradients(self) -> list[torch.Tensor]:
        """The gradients of A and B of each adapter, in their dtypes, once all parts have been added."""
        flat = []
        for (A, B, s), (grad_A, grad_B) in zip(self.factors, self.gradients, strict=True):
            # B came with the scaling in it, A without
            flat += [grad_A.to(A.dtype), grad_B.mul_(s).to(B.dtype)]
        return flat

    @cached_property
    def gradients(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The sums so far, of the shapes of A and B."""
        return [(torch.zeros_like(A), torch.zeros_like(B)) for A, B in self.scaled_factors]

    def buffer(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """A buffer that is there already if it was asked for before, laid out in memory as the weight is."""
        buffer = self._scratch.get(name)
        if buffer is None or buffer.numel() < rows * columns or buffer.dtype != dtype:
            buffer = self._scratch[name] = torch.empty(rows * columns, dtype=dtype, device="cpu")
        flat = buffer[: rows * columns]
        return flat.view(columns, rows).t() if self.transposed else flat.view(rows, columns)
