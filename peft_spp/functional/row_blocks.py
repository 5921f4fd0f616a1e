# SPDX-License-Identifier: Apache-2.0
"""How the rows of a weight are split into the blocks that share a row of A."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch


class RowTile(NamedTuple):
    """A run of consecutive rows that all belong to equally long (parts of) row blocks.

    With it, `weight[tile.rows].view(blocks, rows_per_block, n)` broadcasts against `A[tile.blocks].unsqueeze(1)`, so
    that P(A) never has to be written to memory.
    """

    rows: slice
    blocks: slice
    rows_per_block: int


def row_block_index(rows: int, r: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """
    The block that each output row belongs to.

    The rows are split into `r` consecutive blocks as evenly as they go, as [`torch.tensor_split`] does: the first
    `rows % r` blocks have one row more than the others. Where `r` divides `rows` every block has `rows // r` rows.

    Args:
        rows (`int`): The number of output rows m.
        r (`int`): The number of row blocks, at most `rows`.
        device (`torch.device` or `str`, *optional*, defaults to the CPU): Where to create the index.

    Returns:
        `torch.Tensor`: int64, shape `(rows,)`, values in `[0, r)`.
    """
    short, long_blocks = divmod(rows, r)
    index = torch.arange(rows, device=device)
    if long_blocks == 0:
        return index // short
    long_rows = long_blocks * (short + 1)
    return torch.where(index < long_rows, index // (short + 1), (index - long_rows) // short + long_blocks)


def expand_row_blocks(A: torch.Tensor, rows: int) -> torch.Tensor:
    """
    P(A): every row of A, repeated over the output rows of its block.

    Args:
        A (`torch.Tensor`): The input factor, shape `(r, n)`.
        rows (`int`): The number of output rows m.

    Returns:
        `torch.Tensor`: shape `(rows, n)`; equal to `A.repeat_interleave(rows // r, dim=0)` where r divides `rows`.

    Raises:
        ValueError: If A has more rows than `rows`.
    """
    r, n = A.shape
    check_row_blocks(rows, r)
    if rows % r == 0:
        # an expanded view: a compiler fuses it away, whereas an index would be read for every element
        return A.unsqueeze(1).expand(r, rows // r, n).reshape(rows, n)
    return A[row_block_index(rows, r, device=A.device)]


def refine_row_blocks(A: torch.Tensor, rows: int, r: int, layers: int = 1) -> torch.Tensor:
    """
    The same P(A) from a factor with more row blocks.

    It is there if each block of A ends where one of the r blocks ends: for one, if the number of A's blocks divides r
    and r divides `rows`, and always with one block a row.

    Args:
        A (`torch.Tensor`): The input factor, shape `(own blocks, n)`; of a stack `(layers · own blocks, n)`.
        rows (`int`): The number of output rows m, of each layer.
        r (`int`): The number of row blocks of the result.
        layers (`int`, *optional*, defaults to 1): The number of layers in the stack.

    Returns:
        `torch.Tensor`: shape `(layers · r, n)`, with the rows of A, each repeated.

    Raises:
        ValueError: If P(A) cannot be had with r blocks.
    """
    own = A.shape[0] // layers
    check_row_blocks(rows, own)
    check_row_blocks(rows, r)
    blocks = row_block_index(rows, own)
    sizes = torch.bincount(row_block_index(rows, r))
    ends = sizes.cumsum(0)
    first, last = blocks[ends - sizes], blocks[ends - 1]
    if not torch.equal(first, last):
        raise ValueError(
            f"{own} blocks of {rows} rows are not made up of whole blocks if those are {r}; they are with a multiple "
            f"of {own} that divides {rows}, and with {rows}"
        )
    return A.unflatten(0, (layers, own))[:, first.to(A.device)].flatten(0, 1)


def row_tiles(rows: int, r: int, within: slice | None = None, max_rows: int | None = None) -> Iterator[RowTile]:
    """
    Cover rows with tiles inside which the (parts of) row blocks are of equal length.

    Args:
        rows (`int`): The number of output rows m.
        r (`int`): The number of row blocks, at most `rows`.
        within (`slice`, *optional*): The rows to cover, by default all of them.
        max_rows (`int`, *optional*): The most rows a tile may have. By default whole blocks of equal length come
            together, so that all rows are covered by at most two tiles: the longer row blocks and the shorter ones.

    Yields:
        `RowTile`: In the order of the rows.
    """
    short, long_blocks = divmod(rows, r)
    long_rows = long_blocks * (short + 1)
    start, stop = (0, rows) if within is None else (within.start, within.stop)
    for first_row, last_row, first_block, length in (
        (0, long_rows, 0, short + 1),
        (long_rows, rows, long_blocks, short),
    ):
        row, end = max(start, first_row), min(stop, last_row)
        # a block too long for one tile is cut into parts of about equal length
        part = length if max_rows is None else -(-length // -(-length // max_rows))
        while row < end:
            block, offset = divmod(row - first_row, length)
            most = end - row if max_rows is None else min(end - row, max_rows)
            if offset or most < length:
                blocks, per_block = 1, min(length - offset, end - row, part)
            else:
                blocks, per_block = most // length, length
            first = first_block + block
            yield RowTile(slice(row, row + blocks * per_block), slice(first, first + blocks), per_block)
            row += blocks * per_block


def check_row_blocks(rows: int, r: int) -> None:
    """Raise a `ValueError` unless `rows` rows can be split into `r` non-empty blocks."""
    if not 1 <= r <= rows:
        raise ValueError(f"The number of row blocks r must be between 1 and the number of rows {rows}, got r={r}.")
