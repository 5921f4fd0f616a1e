# SPDX-License-Identifier: Apache-2.0
"""The CPU backend: W' and gyᵀx are made and used chunk by chunk, and never exist as a whole.

A fresh m×n tensor costs more in page faults than the arithmetic on it (11008×4096 in float32: 87 ms to fill a new one,
17 ms to fill one that is there), and one that leaves the caches is read back from main memory. So the weight is
walked in chunks, each used by a matmul right after it is made.

The forward pass walks chunks of rows, since a row of W' makes a column of the output. The gradient of x walks chunks
of columns for the same reason: it needs no sum over chunks. Either keeps the matmuls at the speed of whole ones.

What is done to the elements of a chunk is in `native` (C++, compiled on first use) and in `tiled` (PyTorch's own
operations, for every other dtype and wherever there is no compiler).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ...bitmask import WORD, Compressed
from ...factors import Factors
from . import bitmask
from .elementwise import Elementwise
from .native import NativeElementwise
from .tiled import TiledElementwise


CHUNK_ELEMENTS = 1 << 23


def scaled_weight(
    weight: torch.Tensor | Compressed,
    factors: Sequence[Factors],
    identity: bool,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """W' as a whole, in `out` or the memory layout of the weight; see [`peft_spp.functional.scaled_weight`]."""
    if out is None:
        layout = torch.empty(weight.shape, device="meta") if isinstance(weight, Compressed) else weight
        out = torch.empty_like(layout, dtype=dtype, device="cpu")
    work = _elementwise(weight, factors, dtype, out)
    work.write_scaled(out, slice(0, weight.shape[0]), slice(0, weight.shape[1]), identity)
    return out


def linear(
    x: torch.Tensor,
    weight: torch.Tensor | Compressed,
    bias: torch.Tensor | None,
    factors: Sequence[Factors],
    identity: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`x @ W'.T + bias` for the `(m, n)` weight, chunk by chunk of rows."""
    m, n = weight.shape
    x2d = x.reshape(-1, n).to(dtype)
    # not a view: autograd forbids changing a view that a Function returns in place, as some models do
    result = torch.empty(*x.shape[:-1], m, dtype=dtype)
    y = result.view(x2d.shape[0], m)
    work = _elementwise(weight, factors, dtype)
    for rows, chunk in _scaled_chunks(work, by_rows=True, identity=identity, dtype=dtype):
        if bias is None:
            torch.mm(x2d, chunk.t(), out=y[:, rows])
        else:
            torch.addmm(bias[rows].to(dtype), x2d, chunk.t(), out=y[:, rows])
    return result


def linear_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | Compressed,
    factors: Sequence[Factors],
    identity: bool,
    dtype: torch.dtype,
    needs_x: bool,
    needs_factors: bool,
) -> list[torch.Tensor]:
    """The gradients of x, if needed, and then of A and B of each adapter, if needed."""
    m, n = weight.shape
    grad_y2d = grad_y.reshape(-1, m)
    work = _elementwise(weight, factors, dtype)
    grads = []
    if needs_x:
        grad_x = torch.empty(grad_y2d.shape[0], n, dtype=dtype)
        for columns, chunk in _scaled_chunks(work, by_rows=False, identity=identity, dtype=dtype):
            torch.mm(grad_y2d, chunk, out=grad_x[:, columns])
        grads.append(grad_x.view(x.shape).to(x.dtype))
    if needs_factors:
        x2d = x.reshape(-1, n).to(dtype)
        by_rows = m >= n  # cutting the longer side leaves the matmul the better shape
        # 4096×11008 in bfloat16 took 1.08 and 1.25 times the whole product (512 and 2048 tokens) in chunks of 2^23
        # elements, and 0.93 and 0.91 times in these; in float32 the larger ones are better
        chunk_elements = CHUNK_ELEMENTS if dtype.itemsize > 2 else CHUNK_ELEMENTS // 2
        for rows, columns in _regions(m, n, by_rows, chunk_elements):
            product = work.buffer("chunk", rows.stop - rows.start, columns.stop - columns.start, dtype)
            torch.mm(grad_y2d[:, rows].t(), x2d[:, columns], out=product)
            work.add_factor_gradients(product, rows, columns)
        grads.extend(work.factor_gradients())
    return grads


def factor_gradients(
    product: torch.Tensor, weight: torch.Tensor | Compressed, factors: Sequence[Factors]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The gradients of A and B of each adapter, given that of W' as a whole; see `composite.factor_gradients`."""
    work = _elementwise(weight, factors, product.dtype, product)
    work.add_factor_gradients(product, slice(0, weight.shape[0]), slice(0, weight.shape[1]))
    grads = work.factor_gradients()
    return list(zip(grads[::2], grads[1::2], strict=True))


def _elementwise(
    weight: torch.Tensor | Compressed,
    factors: Sequence[Factors],
    dtype: torch.dtype,
    other: torch.Tensor | None = None,
) -> Elementwise:
    """`other` is a tensor to write or read next to the weight, where that is not a buffer of ours."""
    if isinstance(weight, Compressed):
        if bitmask.supports(weight, factors, dtype) and (other is None or other.stride(1) == 1):
            return bitmask.BitmaskElementwise(weight, factors)
        weight = bitmask.expand(weight)
    kind = NativeElementwise if NativeElementwise.supports(weight, factors, dtype, other) else TiledElementwise
    return kind(weight, factors)


def _scaled_chunks(
    work: Elementwise, by_rows: bool, identity: bool, dtype: torch.dtype
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield `(chunk, W'[chunk])`, or `W'[:, chunk]`. All are written into the same buffer."""
    m, n = work.weight.shape
    for rows, columns in _regions(m, n, by_rows, CHUNK_ELEMENTS):
        out = work.buffer("chunk", rows.stop - rows.start, columns.stop - columns.start, dtype)
        work.write_scaled(out, rows, columns, identity)
        yield (rows if by_rows else columns), out


def _regions(m: int, n: int, by_rows: bool, chunk_elements: int) -> Iterator[tuple[slice, slice]]:
    """Cut the rows or the columns of an m×n weight so that a part has about `chunk_elements` elements."""
    size = m if by_rows else n
    count = -(-m * n // chunk_elements)
    # a multiple of the matmul's register blocking, and of the words of a compressed weight's bitmask
    step = -(-size // max(count, 1) // WORD) * WORD if size >= WORD else size
    for start in range(0, size, step):
        part = slice(start, min(start + step, size))
        yield (part, slice(0, n)) if by_rows else (slice(0, m), part)
