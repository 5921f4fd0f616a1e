# SPDX-License-Identifier: Apache-2.0
"""
The Triton kernels that read a weight without its zeros. Importing this module needs Triton; [`triton`] imports it.

A tile of the weight has the shape (rows, bytes of the bitmask, 8 places of a byte). A value lies behind the values of
the rows before (the row's offset), of the tiles before (carried from tile to tile), of the bytes before (a prefix sum
over the tile) and of the places before in its byte (a prefix sum in the nibbles of one number). Places without a value
are not loaded, so nothing is read outside the values. Tuples and row blocks are as in `triton_kernels`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_kernels import block_of, blocks_of_tile, round_to


@triton.jit
def load_bytes(lines, inside, first_byte, row_bytes, BYTES: tl.constexpr):
    """Bytes of the bitmask of each row, zero outside it."""
    columns = first_byte + tl.arange(0, BYTES)
    mask = inside[:, None] & (columns < row_bytes)[None, :]
    return tl.load(lines[:, None] + columns[None, :], mask=mask, other=0).to(tl.int32)


@triton.jit
def spread_bits(bits):
    """The eight bits of a byte, each in a nibble: times 0x11111111 every nibble counts the bits up to its own."""
    spread = (bits | (bits << 12)) & 0x000F000F
    spread = (spread | (spread << 6)) & 0x03030303
    return (spread | (spread << 3)) & 0x11111111


@triton.jit
def count_bits(bits):
    """How many bits of each byte are set."""
    return ((spread_bits(bits) * 0x11111111) >> 28) & 15


@triton.jit
def load_stored(starts, bits):
    """
    A tile of the weight, with zeros where nothing is stored.

    `starts` points to the first value of each row in the tile, and `bits` has the bytes of the bitmask.
    """
    counts = count_bits(bits)
    before_byte = tl.cumsum(counts, axis=1) - counts
    before_place = spread_bits(bits) * 0x11111110
    place = tl.arange(0, 8)[None, None, :]
    pointers = starts[:, None] + before_byte
    position = ((before_place[:, :, None] >> (4 * place)) & 15).to(tl.uint32)
    stored = ((bits[:, :, None] >> place) & 1) != 0
    return tl.load(pointers[:, :, None] + position, mask=stored, other=0.0)


@triton.jit
def scale_tile(
    w,
    As,
    Bs,
    scalings,
    lengths,
    longer,
    m,
    n,
    row_tile,
    first_byte,
    OUT: tl.constexpr,
    IDENTITY: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """A tile of W', rounded once, from that of W; without adapters W itself."""
    ROWS: tl.constexpr = w.shape[0]
    BYTES: tl.constexpr = w.shape[1]
    if len(As) == 0:
        if w.dtype == OUT:
            return w
        else:
            return round_to(w.to(DTYPE), OUT)
    else:
        rows = row_tile * ROWS + tl.arange(0, ROWS)
        columns = (first_byte + tl.arange(0, BYTES))[:, None] * 8 + tl.arange(0, 8)[None, :]
        in_one_block = True
        for i in tl.static_range(len(As)):
            first, last = blocks_of_tile(row_tile, m, lengths[i], longer[i], ROWS)
            in_one_block = in_one_block & (first == last)
        factor = tl.full((ROWS, BYTES, 8), 1.0 if IDENTITY else 0.0, DTYPE)
        if in_one_block:
            for i in tl.static_range(len(As)):
                b = tl.load(Bs[i] + rows, mask=rows < m, other=0.0).to(DTYPE) * scalings[i]
                block = block_of(row_tile * ROWS, lengths[i], longer[i]).to(tl.int64)
                a_row = tl.load(As[i] + block * n + columns, mask=columns < n, other=0.0).to(DTYPE)
                factor += b[:, None, None] * a_row[None, :, :]
        else:
            mask = (rows < m)[:, None, None] & (columns < n)[None, :, :]
            for i in tl.static_range(len(As)):
                b = tl.load(Bs[i] + rows, mask=rows < m, other=0.0).to(DTYPE) * scalings[i]
                blocks = block_of(rows, lengths[i], longer[i]).to(tl.int64)
                a_pointers = As[i] + blocks[:, None, None] * n + columns[None, :, :]
                factor += b[:, None, None] * tl.load(a_pointers, mask=mask, other=0.0).to(DTYPE)
        # a zero stays a zero also where the factor overflows
        return round_to(tl.where(w == 0.0, 0.0, w.to(DTYPE) * factor), OUT)


@triton.jit
def expanded_weight_kernel(
    values,
    bitmask,
    row_offsets,
    out,
    As,
    Bs,
    scalings,
    lengths,
    longer,
    m,
    n,
    row_bytes,
    out_row_stride,
    out_column_stride,
    IDENTITY: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
    SPAN: tl.constexpr,
):
    """`SPAN` bytes of the bitmask of some rows of W', tile by tile; the bits before them are counted first."""
    spans = tl.cdiv(row_bytes, SPAN)
    row_tile = tl.program_id(0) // spans
    first_byte = (tl.program_id(0) % spans) * SPAN
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    inside = rows < m
    # int64, because m·n can exceed 2^31
    rows64 = rows.to(tl.int64)
    lines = bitmask + rows64 * row_bytes
    starts = values + tl.load(row_offsets + rows, mask=inside, other=0)
    for byte in range(0, first_byte, SPAN):
        starts += tl.sum(count_bits(load_bytes(lines, inside, byte, row_bytes, SPAN)), axis=1)

    for byte in range(first_byte, tl.minimum(first_byte + SPAN, row_bytes), BYTES):
        bits = load_bytes(lines, inside, byte, row_bytes, BYTES)
        w = load_stored(starts, bits)
        scaled = scale_tile(
            w, As, Bs, scalings, lengths, longer, m, n, row_tile, byte, out.dtype.element_ty, IDENTITY, DTYPE
        )
        columns = (byte + tl.arange(0, BYTES))[:, None] * 8 + tl.arange(0, 8)[None, :]
        pointers = out + rows64[:, None, None] * out_row_stride + columns.to(tl.int64)[None, :, :] * out_column_stride
        tl.store(pointers, scaled, mask=inside[:, None, None] & (columns < n)[None, :, :])
        starts += tl.sum(count_bits(bits), axis=1)


@triton.jit
def few_tokens_kernel(
    x,
    values,
    bitmask,
    row_offsets,
    bias,
    y,
    As,
    Bs,
    scalings,
    lengths,
    longer,
    m,
    n,
    row_bytes,
    tokens,
    IDENTITY: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
    MATMUL: tl.constexpr,
):
    """
    Some columns of y = x W'ᵀ + bias for up to `TOKENS` tokens, summed in float32.

    With `GROUPS` the products of a tile are matmuls on tensor cores in the dtype `MATMUL`, of as many parts of its
    columns: one for each warp, so that none repeats the work of another.
    """
    row_tile = tl.program_id(0)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    inside = rows < m
    lines = bitmask + rows.to(tl.int64) * row_bytes
    starts = values + tl.load(row_offsets + rows, mask=inside, other=0)
    token = tl.arange(0, TOKENS)
    if GROUPS > 0:
        total = tl.zeros((GROUPS, ROWS, TOKENS), tl.float32)
    elif TOKENS == 1:
        total = tl.zeros((ROWS, BYTES, 8), tl.float32)
    else:
        total = tl.zeros((ROWS, TOKENS), tl.float32)
    for byte in range(0, row_bytes, BYTES):
        bits = load_bytes(lines, inside, byte, row_bytes, BYTES)
        w = load_stored(starts, bits)
        starts += tl.sum(count_bits(bits), axis=1)
        scaled = scale_tile(
            w, As, Bs, scalings, lengths, longer, m, n, row_tile, byte, y.dtype.element_ty, IDENTITY, DTYPE
        )
        if GROUPS > 0:
            WIDTH: tl.constexpr = BYTES * 8 // GROUPS
            grouped = tl.permute(tl.reshape(scaled, (ROWS, GROUPS, WIDTH)), (1, 0, 2))
            columns = byte * 8 + tl.arange(0, GROUPS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
            pointers = x + columns[:, :, None] + token[None, None, :] * n
            x_tile = tl.load(pointers, mask=(columns < n)[:, :, None] & (token < tokens)[None, None, :], other=0.0)
            total = tl.dot(grouped.to(MATMUL), x_tile.to(MATMUL), total)
        else:
            columns = (byte + tl.arange(0, BYTES))[:, None] * 8 + tl.arange(0, 8)[None, :]
            for t in tl.static_range(TOKENS):
                # of one token `t < tokens` is a Python bool, which Triton 3.9 does not combine with a mask
                end = tl.where(t < tokens, n, 0)
                x_row = tl.load(x + t * n + columns, mask=columns < end, other=0.0).to(tl.float32)
                products = scaled.to(tl.float32) * x_row[None, :, :]
                if TOKENS == 1:
                    total += products
                else:
                    sums = tl.sum(tl.reshape(products, (ROWS, BYTES * 8)), axis=1)
                    total += tl.where((token == t)[None, :], sums[:, None], 0.0)
    if GROUPS > 0:
        sums = tl.sum(total, axis=0)
    elif TOKENS == 1:
        sums = tl.sum(tl.reshape(total, (ROWS, BYTES * 8)), axis=1)[:, None]
    else:
        sums = total
    if bias is not None:
        sums += tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)[:, None]
    pointers = y + token.to(tl.int64)[None, :] * m + rows[:, None]
    tl.store(pointers, round_to(sums, y.dtype.element_ty), mask=inside[:, None] & (token < tokens)[None, :])
