# SPDX-License-Identifier: Apache-2.0
"""Counting over one weight, or a pair, in pieces of bounded size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields

from torch import Tensor

from .bits import CHUNK_ELEMENTS, CHUNK_ELEMENTS_ON_ACCELERATOR, count_true, look_at
from .pattern import fullest_group


@dataclass
class Counts:
    """What one weight holds."""

    zeros: int = 0  # how many values are `0.0` or `-0.0`
    negative_zeros: int = 0  # how many are `-0.0`
    non_finite: int = 0  # how many are infinite or NaN
    # for each group size, the count of non-zeros in the fullest group of inputs
    fullest: dict[int, int] = field(default_factory=dict)


@dataclass
class PairCounts:
    """What became of the zeros between two versions of one weight."""

    zeros_before: int = 0  # how many values were zero
    zeros_after: int = 0  # how many are zero
    lost: int = 0  # how many were zero and are not
    negative_zeros: int = 0  # how many are `-0.0`
    non_finite: int = 0  # how many are infinite or NaN

    @property
    def gained(self) -> int:
        """How many were not zero and are."""
        return self.zeros_after - (self.zeros_before - self.lost)

    def add(self, other: PairCounts) -> None:
        """Add the counts of another piece."""
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))


def _matrices(weight: Tensor) -> Iterator[Tensor]:
    """The 2-D weights that a 2-D or 3-D (one per expert) weight consists of."""
    weight = weight.detach()
    if weight.dim() == 2:
        yield weight
    else:
        yield from weight.unbind(0)


def _pieces(matrix: Tensor, along: int) -> Iterator[Tensor]:
    """Cut a matrix along one dimension into pieces of few elements, and at least one row or column."""
    most = CHUNK_ELEMENTS if matrix.device.type == "cpu" else CHUNK_ELEMENTS_ON_ACCELERATOR
    step = max(1, most // max(1, matrix.shape[1 - along]))
    for start in range(0, matrix.shape[along], step):
        yield matrix.narrow(along, start, min(step, matrix.shape[along] - start))


def count(weight: Tensor, *, transposed: bool, group_sizes: Iterable[int]) -> Counts:
    """Count zeros and the fullest groups of one weight."""
    counts = Counts(fullest=dict.fromkeys(group_sizes, 0))
    for matrix in _matrices(weight):
        for piece in _pieces(matrix, along=1 if transposed else 0):
            look = look_at(piece)
            counts.zeros += piece.numel() - count_true(look.nonzero)
            counts.negative_zeros += look.negative_zeros
            counts.non_finite += look.non_finite
            rows = (look.nonzero.T if transposed else look.nonzero).contiguous()
            for size, so_far in counts.fullest.items():
                counts.fullest[size] = max(so_far, fullest_group(rows, size))
    return counts


def count_pair(before: Tensor, after: Tensor) -> PairCounts:
    """Count what became of the zeros of one weight."""
    counts = PairCounts()
    for old_matrix, new_matrix in zip(_matrices(before), _matrices(after), strict=True):
        for old_piece, new_piece in zip(_pieces(old_matrix, 0), _pieces(new_matrix, 0), strict=True):
            old = look_at(old_piece).nonzero
            look = look_at(new_piece)
            new = look.nonzero.to(old.device)
            nonzeros_after = count_true(new)
            counts.zeros_before += old.numel() - count_true(old)
            counts.zeros_after += new.numel() - nonzeros_after
            counts.lost += nonzeros_after - count_true(new & old)
            counts.negative_zeros += look.negative_zeros
            counts.non_finite += look.non_finite
    return counts
