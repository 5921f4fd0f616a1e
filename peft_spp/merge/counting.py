# SPDX-License-Identifier: Apache-2.0
"""What a merge did to the zeros of a piece of a weight, told from its bits.

The counts are those of `peft_spp.sparsity`, made with numpy on the integers behind the values: it compares and counts
them several times faster than torch does, and a merge counts as much as it computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..sparsity.bits import FORMATS


# temporaries that stay in a core's own cache
_CHUNK_ELEMENTS = 1 << 17


@dataclass
class ZeroCounts:
    """What became of the zeros of a weight; counts of pieces add up.

    Args:
        before (`int`): How many values were zero.
        after (`int`): How many are zero.
        lost (`int`): How many were zero and are not.
        non_finite (`int`): How many are infinite or NaN.
    """

    before: int = 0
    after: int = 0
    lost: int = 0
    non_finite: int = 0

    @property
    def gained(self) -> int:
        """How many were not zero and are."""
        return self.after - (self.before - self.lost)

    def add(self, other: ZeroCounts) -> None:
        """Add the counts of another piece."""
        self.before += other.before
        self.after += other.after
        self.lost += other.lost
        self.non_finite += other.non_finite


def count_zeros(before: Tensor, after: Tensor) -> ZeroCounts:
    """Count what became of the zeros.

    Args:
        before (`torch.Tensor`): Floating, contiguous.
        after (`torch.Tensor`): Of the same shape and dtype, contiguous.

    Returns:
        `ZeroCounts`: The counts; `-0.0` is a zero.
    """
    old_bits, new_bits = _bits(before), _bits(after)
    sign_off, non_finite = _masks(before.dtype)
    counts = ZeroCounts()
    for start in range(0, old_bits.size, _CHUNK_ELEMENTS):
        chunk = slice(start, start + _CHUNK_ELEMENTS)
        old, size = (old_bits[chunk] & sign_off) != 0, new_bits[chunk] & sign_off
        new = size != 0
        counts.before += old.size - int(np.count_nonzero(old))
        counts.after += new.size - int(np.count_nonzero(new))
        counts.lost += int(np.count_nonzero(new > old))
        if size.max() >= non_finite:
            counts.non_finite += int(np.count_nonzero(size >= non_finite))
    return counts


def count_non_finite(values: Tensor) -> int:
    """Count infinities and NaNs.

    Args:
        values (`torch.Tensor`): Of any floating dtype, contiguous.

    Returns:
        `int`: How many there are.
    """
    if values.dtype not in _IEEE:
        values = values.float()
    sign_off, non_finite = _masks(values.dtype)
    return int(np.count_nonzero((_bits(values) & sign_off) >= non_finite))


# of the other formats, some have no infinity and one NaN: there, not every exponent of ones is one
_IEEE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _bits(values: Tensor) -> np.ndarray[Any, Any]:
    bits: np.ndarray[Any, Any] = values.reshape(-1).view(FORMATS[values.dtype].integer).numpy()
    return bits


def _masks(dtype: torch.dtype) -> tuple[int, int]:
    """All bits but the sign, and the bits from which on a value is infinite or NaN."""
    return torch.iinfo(FORMATS[dtype].integer).max, FORMATS[dtype].non_finite
