# SPDX-License-Identifier: Apache-2.0
"""Elementwise work in PyTorch's own operations, in tiles, with scratch buffers of the size of a tile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ...factors import Factors
from ...row_blocks import RowTile, row_block_index, row_tiles
from .elementwise import Elementwise


# Smaller tiles would fit a core's own cache, but lose more to the calls: making W' by rows took 17 ms with these and
# 24 ms with a quarter of them (11008×4096, bfloat16, 2 cores of an EPYC 9004).
TILE_ELEMENTS = 1 << 20


class TiledElementwise(Elementwise):
    """Any floating dtype, any strides; see [`Elementwise`]."""

    def __init__(self, weight: torch.Tensor, factors: Sequence[Factors]) -> None:
        super().__init__(weight, factors)
        # tiles are cut for the row blocks of the first adapter; the rows of another rank's P(A) are looked up
        ranks = [A.shape[0] for A, _ in self.scaled_factors]
        self._tile_rank = ranks[0] if ranks else 1
        self._block_index = {r: row_block_index(weight.shape[0], r) for r in set(ranks) - {self._tile_rank}}

    def write_scaled(self, out: torch.Tensor, rows: slice, columns: slice, identity: bool) -> None:
        if not self.factors:
            out.copy_(self.weight[rows, columns]) if identity else out.zero_()
            return
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

    def add_factor_gradients(self, product: torch.Tensor, rows: slice, columns: slice) -> None:
        for tile in self._tiles(rows, columns):
            stored = self._by_block(self.weight[tile.rows, columns], tile)
            part = self._by_block(product[tile.rows.start - rows.start : tile.rows.stop - rows.start], tile)
            S = self._tile("product", stored)
            torch.mul(self._in_compute_dtype("total", part), self._in_compute_dtype("weight", stored), out=S)
            for (A, B), (grad_A, grad_B) in zip(self.scaled_factors, self.gradients, strict=True):
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
        return self.buffer(name, blocks * rows_per_block, columns, self.dtype).view(like.shape)
