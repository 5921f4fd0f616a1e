# SPDX-License-Identifier: Apache-2.0
"""The effective weight W' and the gradients of its factors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from .row_blocks import check_row_blocks, expand_row_blocks, row_tiles


# On CPU the weight is walked in tiles of this many elements, so that the fp32 intermediates of a tile stay in a core's
# second-level cache instead of going through main memory as m×n tensors.
CPU_TILE_ELEMENTS = 1 << 18
# A larger weight is multiplied in chunks of rows of about this many elements. W' then never exists as a whole, and the
# page faults of a fresh m×n tensor are gone: a trial at 11008×4096 and 512 tokens on 2 cores ran in 306 instead of 615
# ms forward and 853 instead of 1142 ms backward (float32), 175 instead of 204 and 418 instead of 483 ms (bfloat16).
CPU_CHUNK_ELEMENTS = 1 << 21
# Smaller weights are multiplied whole: their W' comes from memory that the allocator keeps (32 MiB in float32), and at
# 2048×2048 two chunks were slower than one product (bfloat16 1.81 against 1.61 times LoRA at 512 tokens).
CPU_CHUNKED_ABOVE_ELEMENTS = 1 << 23


class Factors(NamedTuple):
    """The trainable part of one SPP adapter on one layer.

    Args:
        A (`torch.Tensor`): The input factor, shape `(r, n)`: one row for each block of output rows.
        B (`torch.Tensor`): The output factor, shape `(m, 1)`.
        scaling (`float`): s = alpha / r.
    """

    A: torch.Tensor
    B: torch.Tensor
    scaling: float


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """The dtype that products of factors and weights are computed in: float64 if any input is, otherwise float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def check_factors(weight: torch.Tensor, factors: Sequence[Factors]) -> None:
    """Raise a `ValueError` if the shapes of the factors do not fit the `(m, n)` weight."""
    m, n = weight.shape
    for A, B, _ in factors:
        if A.ndim != 2 or A.shape[1] != n or B.shape != (m, 1):
            raise ValueError(
                f"Factors of shape A {tuple(A.shape)} and B {tuple(B.shape)} do not fit a weight of shape {(m, n)}: "
                f"A must be (r, {n}) and B ({m}, 1)."
            )
        check_row_blocks(m, A.shape[0])


def scaled_weight(
    weight: torch.Tensor,
    factors: Sequence[Factors],
    *,
    identity: bool = True,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """
    W' = W ⊙ (1 + Σ s · P(A) ⊙ B), SPP's equation 4, or with `identity=False` only the update W ⊙ Σ s · P(A) ⊙ B.

    The factor and the product are computed in float32 (float64 if any input is float64) and rounded once, to `dtype`.

    Args:
        weight (`torch.Tensor`): W, shape `(m, n)`, any strides.
        factors (`Sequence[Factors]`): The factors of each active adapter; their updates add up.
        identity (`bool`): Whether to include the 1.
        dtype (`torch.dtype`, *optional*): The dtype of the result, by default that of `weight`.

    Returns:
        `torch.Tensor`: shape `(m, n)`, laid out in memory as `weight` is.

    Raises:
        ValueError: If the shapes of the factors do not fit.
    """
    check_factors(weight, factors)
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return _scaled_weight_composite(weight, factors, identity, dtype or weight.dtype)
    return _scaled_weight_tiled(weight, factors, identity, dtype or weight.dtype)


def _scaled_weight_composite(
    weight: torch.Tensor, factors: Sequence[Factors], identity: bool, dtype: torch.dtype
) -> torch.Tensor:
    """As plain differentiable operations, for compilers and for gradients of gradients."""
    acc = compute_dtype(weight, *(t for A, B, _ in factors for t in (A, B)))
    terms = [expand_row_blocks(A.to(acc), weight.shape[0]) * (B.to(acc) * s) for A, B, s in factors]
    if identity:
        terms.append(torch.ones((), dtype=acc, device=weight.device))
    factor = terms[0]
    for term in terms[1:]:
        factor = factor + term
    return (weight.to(acc) * factor).to(dtype)


def _scaled_weight_tiled(
    weight: torch.Tensor, factors: Sequence[Factors], identity: bool, dtype: torch.dtype
) -> torch.Tensor:
    """Tile by tile, with no intermediate larger than a tile."""
    n = weight.shape[1]
    out = torch.empty_like(weight, dtype=dtype)
    for tile, factor in _tiled_factor(weight, factors, identity):
        shape = (factor.shape[0], -1, n)
        torch.mul(weight[tile].view(shape), factor, out=out[tile].view(shape))
    return out


def is_chunked(weight: torch.Tensor, factors: Sequence[Factors]) -> bool:
    """Whether the weight is large enough, and the tiles of all adapters the same, to be walked in chunks."""
    return (
        weight.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and weight.numel() > CPU_CHUNKED_ABOVE_ELEMENTS
        and len({A.shape[0] for A, _, _ in factors}) == 1
    )


def scaled_weight_chunks(
    weight: torch.Tensor, factors: Sequence[Factors], identity: bool, dtype: torch.dtype
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield `(rows, W'[rows])` over all rows in order. Every chunk is written into the same buffer."""
    n = weight.shape[1]
    chunk_rows = max(_max_tile_rows(weight) or 1, CPU_CHUNK_ELEMENTS // n)
    buffer = torch.empty(chunk_rows, n, dtype=dtype)
    start = filled = 0
    for tile, factor in _tiled_factor(weight, factors, identity):
        size = tile.stop - tile.start
        if filled + size > chunk_rows:
            yield slice(start, start + filled), buffer[:filled]
            start, filled = start + filled, 0
        shape = (factor.shape[0], -1, n)
        torch.mul(weight[tile].view(shape), factor, out=buffer[filled : filled + size].view(shape))
        filled += size
    yield slice(start, start + filled), buffer[:filled]


def _tiled_factor(weight: torch.Tensor, factors: Sequence[Factors], identity: bool):
    """Yield `(rows, factor)` with the factor of those rows shaped `(blocks, rows per block, n)`."""
    m = weight.shape[0]
    acc = compute_dtype(weight, *(t for A, B, _ in factors for t in (A, B)))
    scaled = [(A.to(acc), B.to(acc) * s) for A, B, s in factors]
    if len({A.shape[0] for A, _ in scaled}) > 1:
        # adapters of different rank have no common tiles: give each row a block of its own
        scaled = [(expand_row_blocks(A, m), B) for A, B in scaled]
    for tile in row_tiles(m, scaled[0][0].shape[0], _max_tile_rows(weight)):
        terms = [(A[tile.blocks].unsqueeze(1), B[tile.rows].view(-1, tile.rows_per_block, 1)) for A, B in scaled]
        factor = torch.mul(*terms[0])
        for term in terms[1:]:
            factor.addcmul_(*term)
        if identity:
            factor.add_(1.0)
        yield tile.rows, factor


def _max_tile_rows(weight: torch.Tensor) -> int | None:
    if weight.device.type != "cpu":
        return None
    return max(1, CPU_TILE_ELEMENTS // max(weight.shape[1], 1))


def factor_gradients(
    product: torch.Tensor, weight: torch.Tensor, factors: Factors
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The gradients of A and B, given the gradient of W'.

    With S = (gyᵀ x) ⊙ W they are `gA[k] = s · Σ_{i in block k} B[i] S[i]` and `gB[i] = s · S[i] · P(A)[i]`. S is
    formed tile by tile and the sums are accumulated in float32 (float64 if any input is float64).

    Args:
        product (`torch.Tensor`): gyᵀ x, the gradient of the loss with respect to W', shape `(m, n)`.
        weight (`torch.Tensor`): W, shape `(m, n)`.
        factors (`Factors`): A `(r, n)`, B `(m, 1)` and the scaling s.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The gradients of A and B, in their shapes and dtypes.
    """
    A, B, s = factors
    m, n = weight.shape
    acc = compute_dtype(product, weight, A, B)
    a_acc, b_acc = A.to(acc), B.to(acc)
    if torch.compiler.is_compiling():
        S = product.to(acc) * weight.to(acc)
        grad_B = (S * expand_row_blocks(a_acc, m)).sum(dim=1, keepdim=True)
        weighted = S * b_acc
        if m % A.shape[0] == 0:
            grad_A = weighted.view(A.shape[0], m // A.shape[0], n).sum(dim=1)
        else:
            grad_A = torch.cat(
                [weighted[t.rows].view(-1, t.rows_per_block, n).sum(dim=1) for t in row_tiles(m, A.shape[0])]
            )
        return (grad_A * s).to(A.dtype), (grad_B * s).to(B.dtype)

    total = FactorGradients(factors, weight, acc)
    total.add(slice(0, m), product)
    return total.result()


class FactorGradients:
    """
    The gradients of A and B, summed up over chunks of rows.

    Args:
        factors (`Factors`): A `(r, n)`, B `(m, 1)` and the scaling s.
        weight (`torch.Tensor`): W, shape `(m, n)`.
        dtype (`torch.dtype`): The dtype to accumulate in.
    """

    def __init__(self, factors: Factors, weight: torch.Tensor, dtype: torch.dtype) -> None:
        self.factors = factors
        self.weight = weight
        self.A, self.B = factors.A.to(dtype), factors.B.to(dtype)
        self.grad_A, self.grad_B = torch.zeros_like(self.A), torch.empty_like(self.B)
        self.tiles = list(row_tiles(weight.shape[0], self.A.shape[0], _max_tile_rows(weight)))

    def add(self, rows: slice, product: torch.Tensor) -> None:
        """Add the rows of gyᵀ x, which must be whole tiles; `product` holds just those rows."""
        for tile in self.tiles:
            if not rows.start <= tile.rows.start < rows.stop:
                continue
            shape = (tile.blocks.stop - tile.blocks.start, tile.rows_per_block, -1)
            part = product[tile.rows.start - rows.start : tile.rows.stop - rows.start]
            S = torch.mul(part.view(shape).to(self.A.dtype), self.weight[tile.rows].view(shape))
            torch.matmul(S, self.A[tile.blocks].unsqueeze(2), out=self.grad_B[tile.rows].view(*shape[:2], 1))
            self.grad_A[tile.blocks] += torch.matmul(self.B[tile.rows].view(shape[0], 1, shape[1]), S).squeeze(1)

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        A, B, s = self.factors
        return self.grad_A.mul_(s).to(A.dtype), self.grad_B.mul_(s).to(B.dtype)
