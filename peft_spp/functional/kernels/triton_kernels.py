# SPDX-License-Identifier: Apache-2.0
"""
The Triton kernels: W' on a GPU, its product with few tokens, and the gradients of the factors. Importing this module
needs Triton; [`triton`] imports it at its first call.

Tuples hold one entry for each adapter; the loops over them are unrolled. An adapter's row blocks are identified by
`length = m // r`, the rows of a block, and `longer = m % r`, the number of blocks at the top with one row more.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block_start(block, length, longer):
    """The first row of a row block; the number of rows m for the block behind the last."""
    return block * length + tl.minimum(block, longer)


@triton.jit
def block_of(row, length, longer):
    """The row block of a row. Divisions are slow, so there is one, of operands that depend on the part of the rows."""
    past = row - longer * (length + 1)
    is_longer = past < 0
    return tl.where(is_longer, row, past) // tl.where(is_longer, length + 1, length) + tl.where(is_longer, 0, longer)


@triton.jit
def blocks_of_tile(tile, m, length, longer, TILE_ROWS: tl.constexpr):
    """The first and the last row block that a tile has rows of."""
    first_row = tile * TILE_ROWS
    last_row = tl.minimum(first_row + TILE_ROWS, m) - 1
    return block_of(first_row, length, longer), block_of(last_row, length, longer)


@triton.jit
def tile_of_program(m, n, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, ROWS_FIRST: tl.constexpr):
    """The row and column of this program's tile: successive programs work on neighbors in memory."""
    program = tl.program_id(0)
    if ROWS_FIRST:
        tiles = tl.cdiv(m, TILE_ROWS)
        return program % tiles, program // tiles
    else:
        tiles = tl.cdiv(n, TILE_COLUMNS)
        return program // tiles, program % tiles


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """Round as PyTorch does: from float64 to bfloat16 by way of float32."""
    if DTYPE == tl.bfloat16:
        return x.to(tl.float32).to(DTYPE)
    else:
        return x.to(DTYPE)


@triton.jit
def scaled_weight_kernel(
    weight,
    out,
    As,
    Bs,
    scalings,
    lengths,
    longer,
    m,
    n,
    weight_row_stride,
    weight_column_stride,
    out_row_stride,
    out_column_stride,
    IDENTITY: tl.constexpr,
    DTYPE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
):
    """A tile of W'."""
    row_tile, column_tile = tile_of_program(m, n, TILE_ROWS, TILE_COLUMNS, ROWS_FIRST)
    rows = row_tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    columns = column_tile * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    mask = (rows < m)[:, None] & (columns < n)[None, :]
    # int64, because m·n can exceed 2^31
    rows64, columns64 = rows.to(tl.int64)[:, None], columns.to(tl.int64)[None, :]
    w = tl.load(weight + rows64 * weight_row_stride + columns64 * weight_column_stride, mask=mask, other=0.0)

    # The branch also keeps the loads of W above it, all of them in flight at once: in straight code the assembler
    # moves each down to its use.
    in_one_block = True
    for i in tl.static_range(len(As)):
        first, last = blocks_of_tile(row_tile, m, lengths[i], longer[i], TILE_ROWS)
        in_one_block = in_one_block & (first == last)
    factor = tl.full((TILE_ROWS, TILE_COLUMNS), 1.0 if IDENTITY else 0.0, DTYPE)
    if in_one_block:
        for i in tl.static_range(len(As)):
            b = tl.load(Bs[i] + rows, mask=rows < m, other=0.0).to(DTYPE) * scalings[i]
            block = block_of(row_tile * TILE_ROWS, lengths[i], longer[i]).to(tl.int64)
            a_row = tl.load(As[i] + block * n + columns, mask=columns < n, other=0.0).to(DTYPE)
            factor += b[:, None] * a_row[None, :]
    else:
        for i in tl.static_range(len(As)):
            b = tl.load(Bs[i] + rows, mask=rows < m, other=0.0).to(DTYPE) * scalings[i]
            blocks = block_of(rows, lengths[i], longer[i]).to(tl.int64)
            a = tl.load(As[i] + blocks[:, None] * n + columns64, mask=mask, other=0.0).to(DTYPE)
            factor += b[:, None] * a

    # a zero stays a zero also where the factor overflows
    scaled = round_to(tl.where(w == 0.0, 0.0, w.to(DTYPE) * factor), out.dtype.element_ty)
    tl.store(out + rows64 * out_row_stride + columns64 * out_column_stride, scaled, mask=mask)


@triton.jit
def partial_gradients_kernel(
    product,
    weight,
    As,
    Bs,
    partial_As,
    partial_Bs,
    lengths,
    longer,
    slots,
    m,
    n,
    product_row_stride,
    product_column_stride,
    weight_row_stride,
    weight_column_stride,
    DTYPE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
):
    """
    What a tile of S = product ⊙ W adds to the gradients, without the scaling.

    The sums over its columns go to `partial_Bs[i][column tile, row]`, the sums over its rows of each row block to
    `partial_As[i][row tile · slots + number of the block within the tile, column]`.
    """
    row_tile, column_tile = tile_of_program(m, n, TILE_ROWS, TILE_COLUMNS, ROWS_FIRST)
    rows = row_tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    columns = column_tile * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    mask = (rows < m)[:, None] & (columns < n)[None, :]
    rows64, columns64 = rows.to(tl.int64)[:, None], columns.to(tl.int64)[None, :]
    p = tl.load(product + rows64 * product_row_stride + columns64 * product_column_stride, mask=mask, other=0.0)
    w = tl.load(weight + rows64 * weight_row_stride + columns64 * weight_column_stride, mask=mask, other=0.0)

    for i in tl.static_range(len(As)):
        first, last = blocks_of_tile(row_tile, m, lengths[i], longer[i], TILE_ROWS)
        b = tl.load(Bs[i] + rows, mask=rows < m, other=0.0).to(DTYPE)
        # one block ahead, so that the first load does not wait for those of S
        a_pointers = As[i] + first.to(tl.int64) * n + columns
        a = tl.load(a_pointers, mask=columns < n, other=0.0).to(DTYPE)
        S = p.to(DTYPE) * w.to(DTYPE)
        for block in range(first, last + 1):
            start, stop = block_start(block, lengths[i], longer[i]), block_start(block + 1, lengths[i], longer[i])
            inside = (rows >= start) & (rows < stop)
            grad_a = tl.sum(tl.where(inside[:, None], b[:, None] * S, 0.0), axis=0)
            slot = row_tile.to(tl.int64) * slots[i] + (block - first)
            tl.store(partial_As[i] + slot * n + columns, grad_a, mask=columns < n)
            grad_b = tl.sum(S * a[None, :], axis=1)
            tl.store(partial_Bs[i] + column_tile.to(tl.int64) * m + rows, grad_b, mask=inside)
            a_pointers += n
            width = tl.where(block < last, n, 0)
            a = tl.load(a_pointers, mask=columns < width, other=0.0).to(DTYPE)


@triton.jit
def sum_of_tiles(
    partial, first_tile, last_tile, first_slot, slots, columns, width, TILES: tl.constexpr, COLUMNS: tl.constexpr
):
    """The sum of a column over tiles: in the first tile it lies in slot `first_slot`, in all others in slot 0."""
    total = tl.zeros((TILES, COLUMNS), partial.dtype.element_ty)
    for start in range(first_tile, last_tile + 1, TILES):
        tiles = start + tl.arange(0, TILES)
        lines = tiles.to(tl.int64) * slots + tl.where(tiles == first_tile, first_slot, 0)
        mask = (tiles <= last_tile)[:, None] & (columns < width)[None, :]
        total += tl.load(partial + lines[:, None] * width + columns[None, :], mask=mask, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["column_tiles"])
def sum_partial_gradients_kernel(
    partial_As,
    partial_Bs,
    grad_As,
    grad_Bs,
    scalings,
    ranks,
    lengths,
    longer,
    slots,
    m,
    n,
    column_tiles,
    TILE_ROWS: tl.constexpr,
    TILES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`COLUMNS` elements of a gradient: of adapter i's A in programs (·, 2i), of its B in programs (·, 2i + 1)."""
    program, which = tl.program_id(0), tl.program_id(1)
    for i in tl.static_range(len(grad_As)):
        if which == 2 * i:
            block = program % ranks[i]
            columns = (program // ranks[i]) * COLUMNS + tl.arange(0, COLUMNS)
            first_tile = block_start(block, lengths[i], longer[i]) // TILE_ROWS
            last_tile = (block_start(block + 1, lengths[i], longer[i]) - 1) // TILE_ROWS
            first_slot = block - block_of(first_tile * TILE_ROWS, lengths[i], longer[i])
            grad_a = sum_of_tiles(
                partial_As[i], first_tile, last_tile, first_slot, slots[i], columns, n, TILES, COLUMNS
            )
            grad_a = round_to(grad_a * scalings[i], grad_As[i].dtype.element_ty)
            tl.store(grad_As[i] + block.to(tl.int64) * n + columns, grad_a, mask=columns < n)
        if (which == 2 * i + 1) & (program * COLUMNS < m):
            rows = program * COLUMNS + tl.arange(0, COLUMNS)
            grad_b = sum_of_tiles(partial_Bs[i], 0, column_tiles - 1, 0, 1, rows, m, TILES, COLUMNS)
            grad_b = round_to(grad_b * scalings[i], grad_Bs[i].dtype.element_ty)
            tl.store(grad_Bs[i] + rows, grad_b, mask=rows < m)
