# SPDX-License-Identifier: Apache-2.0
"""Compressed stacks of matrices that lie one below another: values and bitmasks are only moved."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..functional.bitmask import Compressed, count_row_offsets


def put_below(parts: Sequence[Sequence[Compressed]]) -> Compressed:
    """
    Put a stack of experts together.

    Args:
        parts (`Sequence[Sequence[Compressed]]`): The matrices of each expert, one kind of them after another. Those of
            an expert lie one below another, in this order.

    Returns:
        [`Compressed`]: shape `(experts, m, n)`. A zero that is stored stays stored.
    """
    rows = [one for expert in zip(*parts, strict=True) for one in expert]
    bitmask = torch.cat([one.bitmask for one in rows]).unflatten(0, (len(parts[0]), -1))
    return Compressed(torch.cat([one.values for one in rows]), bitmask, count_row_offsets(bitmask), rows[0].columns)


def cut_rows(stack: Compressed, heights: Sequence[int]) -> list[list[Compressed]]:
    """
    Take a stack of experts apart, which is the way back of [`put_below`].

    Args:
        stack ([`Compressed`]): The stack, shape `(experts, m, n)`.
        heights (`Sequence[int]`): How many rows each kind of matrices has.

    Returns:
        `list[list[Compressed]]`: The matrices, copies, kind by kind.
    """
    experts, m, _ = stack.shape
    bitmask = stack.bitmask.flatten(0, 1)
    parts: list[list[Compressed]] = [[] for _ in heights]
    for start in range(0, experts * m, m):
        stop = start
        for part, height in zip(parts, heights, strict=True):
            first, stop = stop, stop + height
            offsets = stack.row_offsets[first : stop + 1]
            values = stack.values[offsets[0] : offsets[-1]].clone()
            part.append(Compressed(values, bitmask[first:stop].clone(), offsets - offsets[0], stack.columns))
    return parts
