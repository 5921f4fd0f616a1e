# SPDX-License-Identifier: Apache-2.0
"""The fallback backend, for any device: the formula in plain differentiable PyTorch operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..factors import Factors, compute_dtype
from ..row_blocks import expand_row_blocks, row_tiles


def scaled_weight(
    weight: torch.Tensor,
    factors: Sequence[Factors],
    identity: bool,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """W' as a whole, in `out` or the memory layout of the weight; see [`peft_spp.functional.scaled_weight`].

    `out` may be the weight itself.
    """
    acc = compute_dtype(weight, *(t for A, B, _ in factors for t in (A, B)))
    w = weight.to(acc)
    terms = [(w * expand_row_blocks(A.to(acc), weight.shape[0])) * (B.to(acc) * s) for A, B, s in factors]
    total = w if identity else terms.pop(0)
    for term in terms:
        total = total + term
    return total.to(dtype) if out is None else out.copy_(total)


def factor_gradients(
    product: torch.Tensor, weight: torch.Tensor, factors: Sequence[Factors]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """
    The gradients of A and B of each adapter, given gyᵀ x, the gradient of W'.

    With S = (gyᵀ x) ⊙ W they are `gA[k] = s · Σ_{i in block k} B[i] S[i]` and `gB[i] = s · S[i] · P(A)[i]`, summed in
    float32 (float64 if any input is float64).

    Args:
        product (`torch.Tensor`): gyᵀ x, shape `(m, n)`.
        weight (`torch.Tensor`): W, shape `(m, n)`.
        factors (`Sequence[Factors]`): The factors of each adapter.

    Returns:
        `list[tuple[torch.Tensor, torch.Tensor]]`: The gradients of A and B, in their shapes and dtypes.
    """
    m, n = weight.shape
    acc = compute_dtype(product, weight, *(t for A, B, _ in factors for t in (A, B)))
    S = product.to(acc) * weight
    grads = []
    for A, B, s in factors:
        grad_B = (S * expand_row_blocks(A, m)).sum(dim=1, keepdim=True)
        weighted = S * B
        blocks = [
            weighted[tile.rows].reshape(-1, tile.rows_per_block, n).sum(dim=1) for tile in row_tiles(m, A.shape[0])
        ]
        grads.append(((torch.cat(blocks) * s).to(A.dtype), (grad_B * s).to(B.dtype)))
    return grads
