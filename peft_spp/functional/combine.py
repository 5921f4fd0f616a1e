# SPDX-License-Identifier: Apache-2.0
"""One SPP adapter for the sum of several."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from .factors import Factors
from .row_blocks import check_row_blocks, row_block_index


class RankOneBlocks(NamedTuple):
    """The SPP factors that come closest to a sum of others."""

    A: torch.Tensor  # the input factor, float64 on the CPU, shape `(r, n)`
    B: torch.Tensor  # the output factor, float64 on the CPU, shape `(m, 1)`; its scaling is 1
    relative_error: float  # the Frobenius norm of what is missing, over that of the sum


@torch.no_grad()
def rank_one_blocks(factors: Sequence[Factors], r: int, layers: int = 1) -> RankOneBlocks:
    """
    The best approximation of `Σ s · P(A) ⊙ B` by a single `P(A) ⊙ B` with r row blocks.

    In every row block a single adapter is a matrix of rank one, `b aᵀ`, and the sum is one of higher rank. So the best
    approximation in the Frobenius norm is its first singular triple, block by block (Eckart and Young 1936), shared
    out evenly over a and b. It is computed from the factors: a block of the sum is `L R`, where R has the rows of all
    A that reach into the block, and the singular values are those of the product of the triangular parts of L and R.

    The norm is that of the factor that multiplies the weight. Weighted by the weight itself, the problem has no closed
    solution.

    Args:
        factors (`Sequence[Factors]`): The factors to add up, of any numbers of row blocks.
        r (`int`): The number of row blocks of the result, in each layer of a stack.
        layers (`int`, *optional*, defaults to 1): The number of layers whose factors these are, see [`Factors`].

    Returns:
        `RankOneBlocks`: The factors and their error. A single adapter with r blocks is reproduced.

    Raises:
        ValueError: If there are no factors, their shapes do not fit together, or r is larger than the rows.
    """
    shapes = {(B.shape[0], A.shape[1]) for A, B, _ in factors}
    if len(shapes) != 1:
        raise ValueError(f"factors of one weight are needed, not of {len(shapes)} shapes (out, in): {sorted(shapes)}")
    m, n = next(iter(shapes))
    if m % layers or any(A.shape[0] % layers for A, _, _ in factors):
        raise ValueError(f"factors with {m} rows of B and {[len(A) for A, _, _ in factors]} of A, in {layers} layers")
    check_row_blocks(m // layers, r)
    A_sum = torch.zeros(layers * r, n, dtype=torch.float64, device="cpu")
    B_sum = torch.zeros(m, 1, dtype=torch.float64, device="cpu")
    squared = missing = 0.0
    for block, (rows, L, R) in enumerate(_block_products(factors, m, r, layers)):
        Q_L, T_L = torch.linalg.qr(L)
        Q_R, T_R = torch.linalg.qr(R.t())
        U, S, Vh = torch.linalg.svd(T_L @ T_R.t(), full_matrices=False)
        root = S[0].sqrt()
        A_sum[block] = Q_R @ Vh[0] * root
        B_sum[rows, 0] = Q_L @ U[:, 0] * root
        squared += S.square().sum().item()
        missing += S[1:].square().sum().item()
    return RankOneBlocks(A_sum, B_sum, math.sqrt(missing / squared) if squared else 0.0)


def _block_products(
    factors: Sequence[Factors], rows: int, r: int, layers: int
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """The rows of each block, and L and R, whose product is the sum of the adapters in these rows."""
    sizes = torch.bincount(_stacked_index(rows, r, layers)).tolist()
    in_float64 = [(A.to("cpu", torch.float64), B.to("cpu", torch.float64) * s) for A, B, s in factors]
    indices = [_stacked_index(rows, A.shape[0] // layers, layers) for A, _ in in_float64]
    start = 0
    for size in sizes:
        within = slice(start, start + size)
        L, R = [], []
        for (A, B), index in zip(in_float64, indices, strict=True):
            own = index[within]
            blocks = own.unique()
            L.append(B[within] * (own.unsqueeze(1) == blocks))
            R.append(A[blocks])
        yield within, torch.cat(L, dim=1), torch.cat(R)
        start += size


def _stacked_index(rows: int, r: int, layers: int) -> torch.Tensor:
    """The row of A that each output row of a stack of layers belongs to."""
    first = torch.arange(layers, device="cpu").unsqueeze(1) * r
    return (row_block_index(rows // layers, r) + first).flatten()
