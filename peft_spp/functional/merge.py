# SPDX-License-Identifier: Apache-2.0
"""Folding factors into a weight without touching a pruned place."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .factors import Factors
from .weight import scaled_weight


# Rows are cleaned in pieces of this many elements: the mask of a piece stays small beside the merged weight itself.
_CLEAN_ELEMENTS = 1 << 22


@torch.no_grad()
def merged_weight(weight: torch.Tensor, factors: Sequence[Factors]) -> torch.Tensor:
    """
    W' = W ⊙ (1 + Σ s · P(A) ⊙ B) as a weight to keep, with every pruned place exactly +0.0.

    Computed in float32 (float64 for a float64 weight) and rounded once to the dtype of `weight`, so that it is the
    weight which [`spp_linear`] uses. Three things are true of the result that the formula alone does not give:

    - a place that is zero in `weight` is +0.0, also where the factor is infinite or not a number;
    - there is no -0.0 (a negative factor makes one; negative zeros have broken 2:4 kernels);
    - a non-finite value stands only where `weight` is not zero.

    Args:
        weight (`torch.Tensor`): W, shape `(m, n)`.
        factors (`Sequence[Factors]`): The factors of the adapters to merge.

    Returns:
        `torch.Tensor`: A new tensor with the shape, dtype and strides of `weight`.

    Raises:
        ValueError: If the shapes of the factors do not fit.
    """
    merged = scaled_weight(weight, factors)
    rows = max(1, _CLEAN_ELEMENTS // max(weight.shape[1], 1))
    for start in range(0, weight.shape[0], rows):
        piece = merged[start : start + rows]
        # `== 0` also holds for -0.0, of the base weight and of a product that underflowed
        piece.masked_fill_((weight[start : start + rows] == 0) | (piece == 0), 0.0)
    return merged
