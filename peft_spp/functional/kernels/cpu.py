# SPDX-License-Identifier: Apache-2.0
"""The CPU backend: W' and gyᵀx are made and used chunk by chunk, and never exist as a whole.

A fresh m×n tensor costs more in page faults than the arithmetic on it (11008×4096 in float32: 87 ms to fill a new one,
17 ms to fill one that is there), and one that leaves the caches is read back from main memory. So the weight is
walked in chunks, each used by a matmul right after it is made, and a chunk in tiles, whose intermediates are small.

The forward pass walks chunks of rows, since a row of W' makes a column of the output. The gradient of x walks chunks
of columns for the same reason: it needs no sum over chunks. Either keeps the matmuls at the speed of whole ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..factors import Factors, compute_dtype
from ..row_blocks import RowTile, row_block_index, row_tiles


CHUNK_ELEMENTS = 1 << 23
# Smaller tiles would fit a core's own cache, but lose more to the calls: making W' by rows took 17 ms with these and
# 24 ms with a quarter of them (11008×4096, bfloat16, 2 cores of an EPYC 9004).
TILE_ELEMENTS = 1 << 20


def scaled_weight(
    weight: torch.Tensor,
    factors: Sequence[Factors],
    identity: bool,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """W' as a whole, in `out` or the memory layout of the weight; see [`peft_spp.functional.scaled_weight`]."""
    out = torch.empty_like(weight, dtype=dtype) if out is None else out
    _WeightWalk(weight, factors).write_scaled(out, slice(0, weight.shape[0]), slice(0, weight.shape[1]), identity)
    return out


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
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
    walk = _WeightWalk(weight, factors)
    for rows, chunk in walk.scaled_chunks(_chunks(m, n), by_rows=True, identity=identity, dtype=dtype):
        if bias is None:
            torch.mm(x2d, chunk.t(), out=y[:, rows])
        else:
            torch.addmm(bias[rows].to(dtype), x2d, chunk.t(), out=y[:, rows])
    return result


def linear_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    factors: Sequence[Factors],
    identity: bool,
    dtype: torch.dtype,
    needs_x: bool,
    needs_factors: bool,
) -> list[torch.Tensor]:
    """The gradients of x, if needed, and then of A and B of each adapter, if needed."""
    m, n = weight.shape
    grad_y2d = grad_y.reshape(-1, m)
    walk = _WeightWalk(weight, factors)
    grads = []
    if needs_x:
        grad_x = torch.empty(grad_y2d.shape[0], n, dtype=dtype)
        for columns, chunk in walk.scaled_chunks(_chunks(n, m), by_rows=False, identity=identity, dtype=dtype):
            torch.mm(grad_y2d, chunk, out=grad_x[:, columns])
        grads.append(grad_x.view(x.shape).to(x.dtype))
    if needs_factors:
        grads.extend(walk.factor_gradients(grad_y2d, x.reshape(-1, n).to(dtype)))
    return grads


def factor_gradients(
    product: torch.Tensor, weight: torch.Tensor, factors: Sequence[Factors]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The gradients of A and B of each adapter, given that of W' as a whole; see `composite.factor_gradients`."""
    grads = _WeightWalk(weight, factors).factor_gradients_of(product)
    return list(zip(grads[::2], grads[1::2], strict=True))


def _chunks(size: int, other_size: int) -> list[slice]:
    """Split one dimension of the weight so that a chunk has about `CHUNK_ELEMENTS` elements."""
    count = -(-size * other_size // CHUNK_ELEMENTS)
    # a multiple of the matmul's register blocking
    step = -(-size // max(count, 1) // 32) * 32 if size >= 32 else size
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


class _WeightWalk:
    """
    Elementwise work on one weight, in tiles, with scratch buffers of the size of a tile.

    Args:
        weight (`torch.Tensor`): W, shape `(m, n)`.
        factors (`Sequence[Factors]`): The factors of each active adapter.
    """

    def __init__(self, weight: torch.Tensor, factors: Sequence[Factors]) -> None:
        self.weight = weight
        self.factors = factors
        self.dtype = compute_dtype(weight, *(t for A, B, _ in factors for t in (A, B)))
        self.scaled_factors = [(A.to(self.dtype), B.to(self.dtype) * s) for A, B, s in factors]
        # tiles are cut for the row blocks of the first adapter; the rows of another rank's P(A) are looked up
        ranks = [A.shape[0] for A, _ in self.scaled_factors]
        self._tile_rank = ranks[0]
        self._block_index = {r: row_block_index(weight.shape[0], r) for r in set(ranks) - {self._tile_rank}}
        # a Conv1D weight comes as a transposed view: everything beside it is laid out alike, to be walked alike
        self.transposed = weight.stride(0) < weight.stride(1)
        self._scratch: dict[str, torch.Tensor] = {}

    def scaled_chunks(
        self, chunks: Sequence[slice], by_rows: bool, identity: bool, dtype: torch.dtype
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield `(chunk, W'[chunk])`, or `W'[:, chunk]`. All are written into the same buffer."""
        for chunk in chunks:
            rows, columns = self._region(chunk, by_rows)
            out = self._buffer("chunk", rows.stop - rows.start, columns.stop - columns.start, dtype)
            self.write_scaled(out, rows, columns, identity)
            yield chunk, out

    def write_scaled(self, out: torch.Tensor, rows: slice, columns: slice, identity: bool) -> None:
        """
        Write W'[rows, columns] to `out`.

        Each element is `round(w + Σ s·b · (w·a))`, in float32 (float64 if an input is) up to the one rounding at the
        end. A pruned `+0.0` stays `+0.0` for any finite factors: `+0.0 + -0.0` is `+0.0`.
        """
        for tile in self._tiles(rows, columns):
            stored = self._by_block(self.weight[tile.rows, columns], tile)
            target = self._by_block(out[tile.rows.start - rows.start : tile.rows.stop - rows.start], tile)
            w = self._in_compute_dtype("weight", stored)
            total = target if target.dtype == self.dtype else self._tile("total", stored)
            product = self._tile("product", stored)
            before = w if identity else None
            for A, B in self.scaled_factors:
                torch.mul(w, self._rows_of(A, tile, columns), out=product)
                b = B[tile.rows].view(-1, tile.rows_per_block, 1)
                if before is None:
                    torch.mul(product, b, out=total)
                else:
                    torch.addcmul(before, product, b, out=total)
                before = total
            if total is not target:
                target.copy_(total)

    def factor_gradients(self, grad_y: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
        """
        The gradients of A and B of each adapter, in their dtypes.

        With S = (gyᵀ x) ⊙ W they are `gA[k] = s · Σ_{i in block k} B[i] S[i]` and `gB[i] = s · S[i] · P(A)[i]`. gyᵀ x
        is rounded once to the dtype of the matmul; S and the sums are in float32 (float64 if an input is).
        """
        m, n = self.weight.shape
        by_rows = m >= n  # cutting the longer side leaves the matmul the better shape
        grads = self._zero_gradients()
        for chunk in _chunks(m, n) if by_rows else _chunks(n, m):
            rows, columns = self._region(chunk, by_rows)
            product = self._buffer("chunk", rows.stop - rows.start, columns.stop - columns.start, grad_y.dtype)
            torch.mm(grad_y[:, rows].t(), x[:, columns], out=product)
            self._add_factor_gradients(product, rows, columns, grads)
        return self._finished(grads)

    def factor_gradients_of(self, product: torch.Tensor) -> list[torch.Tensor]:
        """The same, given gyᵀ x or any other gradient of W'."""
        grads = self._zero_gradients()
        self._add_factor_gradients(product, slice(0, product.shape[0]), slice(0, product.shape[1]), grads)
        return self._finished(grads)

    def _zero_gradients(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(torch.zeros_like(A), torch.zeros_like(B)) for A, B in self.scaled_factors]

    def _finished(self, grads: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
        flat = []
        for (A, B, s), (grad_A, grad_B) in zip(self.factors, grads, strict=True):
            # B came with the scaling in it, A without
            flat += [grad_A.to(A.dtype), grad_B.mul_(s).to(B.dtype)]
        return flat

    def _add_factor_gradients(
        self, product: torch.Tensor, rows: slice, columns: slice, grads: Sequence[tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        for tile in self._tiles(rows, columns):
            stored = self._by_block(self.weight[tile.rows, columns], tile)
            part = self._by_block(product[tile.rows.start - rows.start : tile.rows.stop - rows.start], tile)
            S = self._tile("product", stored)
            torch.mul(self._in_compute_dtype("total", part), self._in_compute_dtype("weight", stored), out=S)
            for (A, B), (grad_A, grad_B) in zip(self.scaled_factors, grads, strict=True):
                scratch = self._tile("total", stored)
                index = self._block_index.get(A.shape[0])
                if index is None:
                    grad_A[tile.blocks, columns] += torch.bmm(B[tile.rows].view(-1, 1, tile.rows_per_block), S)[:, 0]
                else:
                    torch.mul(S, B[tile.rows].view(-1, tile.rows_per_block, 1), out=scratch)
                    grad_A[:, columns].index_add_(0, index[tile.rows], scratch.flatten(0, 1))
                # a batched product with one column, in place of this product and sum, was six times slower
                torch.mul(S, self._rows_of(A, tile, columns), out=scratch)
                grad_B[tile.rows] += scratch.sum(dim=2).view(-1, 1)

    def _region(self, chunk: slice, by_rows: bool) -> tuple[slice, slice]:
        m, n = self.weight.shape
        return (chunk, slice(0, n)) if by_rows else (slice(0, m), chunk)

    def _tiles(self, rows: slice, columns: slice) -> Iterator[RowTile]:
        most = max(1, TILE_ELEMENTS // max(columns.stop - columns.start, 1))
        return row_tiles(self.weight.shape[0], self._tile_rank, rows, most)

    def _rows_of(self, A: torch.Tensor, tile: RowTile, columns: slice) -> torch.Tensor:
        """P(A)[tile.rows, columns], to be broadcast against the tile."""
        index = self._block_index.get(A.shape[0])
        if index is None:
            return A[tile.blocks, columns].unsqueeze(1)
        return self._by_block(A[:, columns][index[tile.rows]], tile)

    @staticmethod
    def _by_block(matrix: torch.Tensor, tile: RowTile) -> torch.Tensor:
        return matrix.view(-1, tile.rows_per_block, matrix.shape[1])

    def _in_compute_dtype(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        return stored if stored.dtype == self.dtype else self._tile(name, stored).copy_(stored)

    def _tile(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """A scratch tile of the shape of another one."""
        blocks, rows_per_block, columns = like.shape
        return self._buffer(name, blocks * rows_per_block, columns, self.dtype).view(like.shape)

    def _buffer(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """A buffer that is there already if it was asked for before, laid out in memory as the weight is."""
        buffer = self._scratch.get(name)
        if buffer is None or buffer.numel() < rows * columns or buffer.dtype != dtype:
            buffer = self._scratch[name] = torch.empty(rows * columns, dtype=dtype)
        flat = buffer[: rows * columns]
        return flat.view(columns, rows).t() if self.transposed else flat.view(rows, columns)
