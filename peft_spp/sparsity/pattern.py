# SPDX-License-Identifier: Apache-2.0
"""N:M patterns: what they are, and how many non-zeros the fullest group of a weight holds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .bits import CHUNK_ELEMENTS, look_at


# Group sizes whose booleans fit one integer: that integer, and the factor that adds up its bytes in the top one.
_PACKED_GROUPS = {
    2: (torch.int16, 0x0101),
    4: (torch.int32, 0x01010101),
    8: (torch.int64, 0x0101010101010101),
}


@dataclass(frozen=True)
class NMPattern:
    """An N:M pattern: at most `n` non-zeros in every group of `m` consecutive input weights.

    Groups start at input 0. If the number of inputs is not a multiple of `m`, the last, incomplete group may hold at
    most `n` non-zeros as well.

    Args:
        n (`int`): How many weights of a group may be non-zero.
        m (`int`): How many consecutive input weights make a group.

    Raises:
        ValueError: If not `0 < n <= m`.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        for value in (self.n, self.m):
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"an N:M pattern needs two integers, got {self.n!r}:{self.m!r}")
        if not 0 < self.n <= self.m:
            raise ValueError(f"an N:M pattern needs 0 < N <= M, got {self.n}:{self.m}")

    @classmethod
    def parse(cls, text: str | NMPattern) -> NMPattern:
        """Read a pattern such as `"2:4"`.

        Args:
            text (`str` or `NMPattern`): The pattern; an `NMPattern` is returned unchanged.

        Returns:
            `NMPattern`: The pattern.

        Raises:
            ValueError: If the text is not `N:M` with `0 < N <= M`.
        """
        if isinstance(text, NMPattern):
            return text
        match = re.fullmatch(r"\s*([0-9]+)\s*:\s*([0-9]+)\s*", text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f"not an N:M pattern: {text!r} (write it like '2:4')")
        return cls(int(match[1]), int(match[2]))

    @property
    def density(self) -> float:
        """The share of weights that may be non-zero, `n / m`."""
        return self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


def parse_patterns(patterns: str | NMPattern | Iterable[str | NMPattern]) -> tuple[NMPattern, ...]:
    """
    Read one pattern or several and put the tightest first.

    Patterns that allow the same share of non-zeros are ordered by group size: whatever holds 2:4 also holds 4:8.

    It returns every pattern once, the tightest first.
    """
    several = [patterns] if isinstance(patterns, (str, NMPattern)) else list(patterns)
    return tuple(sorted({NMPattern.parse(one) for one in several}, key=lambda pattern: (pattern.density, pattern.m)))


DENSE_BELOW = 0.01
"""A weight with a smaller share of zeros counts as dense: chance and underflow make a few, pruning makes more."""


def pattern_name(wanted: Iterable[NMPattern], zeros: int, numel: int, inputs: int, fullest: Mapping[int, int]) -> str:
    """What to call a weight's pattern: `"dense"`, the first of the wanted ones that it holds, or `"unstructured"`."""
    if zeros == 0 or zeros < DENSE_BELOW * numel:
        return "dense"
    # A pattern that forces no zero (4:4, or groups longer than a row) is not found but always there.
    held = (pattern for pattern in wanted if pattern.n < pattern.m <= inputs and fullest[pattern.m] <= pattern.n)
    return str(next(held, "unstructured"))


def fullest_group(nonzero: Tensor, group_size: int) -> int:
    """The largest number of non-zeros in any group of consecutive inputs."""
    inputs = nonzero.shape[1]
    if nonzero.numel() == 0:
        return 0
    if group_size >= inputs:
        return int(nonzero.sum(-1, dtype=torch.int32).max())
    if inputs % group_size:
        nonzero = torch.nn.functional.pad(nonzero, (0, group_size - inputs % group_size))
    if group_size == 1:
        return int(nonzero.any())
    # A slice of a larger tensor may start at an address that is not a multiple of the integer's size.
    if group_size in _PACKED_GROUPS and nonzero.storage_offset() % group_size == 0:
        integer, factor = _PACKED_GROUPS[group_size]
        return int(((nonzero.reshape(-1).view(integer) * factor) >> 8 * (group_size - 1)).max())
    return int(nonzero.reshape(-1, group_size).sum(-1, dtype=torch.int32).max())


def satisfies_n_m(weight_rows_by_inputs: Tensor, pattern: str | NMPattern) -> bool:
    """Whether every group of M consecutive inputs of every row holds at most N non-zeros.

    `-0.0` counts as zero and NaN as non-zero. If the number of inputs is not a multiple of M, the last, incomplete
    group must hold at most N non-zeros too. An empty weight holds every pattern.

    Args:
        weight_rows_by_inputs (`torch.Tensor`):
            Floating, shape `(rows, inputs)`. That is how `nn.Linear` stores its weight; pass `weight.T` for `Conv1D`.
        pattern (`str` or `NMPattern`): The pattern, such as `"2:4"`.

    Returns:
        `bool`: Whether the weight holds the pattern.

    Raises:
        ValueError: If the weight is not 2-D, not of a floating dtype, or on the meta device.
    """
    pattern = NMPattern.parse(pattern)
    if weight_rows_by_inputs.dim() != 2:
        raise ValueError(f"expected a weight of shape (rows, inputs), got {tuple(weight_rows_by_inputs.shape)}")
    weight = weight_rows_by_inputs.detach()
    step = max(1, CHUNK_ELEMENTS // max(1, weight.shape[1]))
    return all(
        fullest_group(look_at(weight[start : start + step]).nonzero.contiguous(), pattern.m) <= pattern.n
        for start in range(0, weight.shape[0], step)
    )
