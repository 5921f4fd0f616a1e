# SPDX-License-Identifier: Apache-2.0
"""The fallback backend, for any device: the formula in plain differentiable PyTorch operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..factors import Factors, compute_dtype
from ..row_blocks import expand_row_blocks, row_tiles
from .backend import KernelBackend
from .scaled import ScaledWeight


class Composite(KernelBackend):
    """PyTorch's operations on whole tensors."""

    def scaled_weight(self, w: ScaledWeight, out: torch.Tensor | None = None) -> torch.Tensor:
        weight = w.dense
        acc = compute_dtype(weight, *(t for A, B, _ in w.factors for t in (A, B)))
        base = weight.to(acc)
        terms = [(base * expand_row_blocks(A.to(acc), weight.shape[0])) * (B.to(acc) * s) for A, B, s in w.factors]
        total = base if w.identity else terms.pop(0)
        for term in terms:
            total = total + term
        return total.to(w.dtype) if out is None else out.copy_(total)

    def factor_gradients(
        self, product: torch.Tensor, weight: torch.Tensor, factors: Sequence[Factors]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
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


composite = Composite()
