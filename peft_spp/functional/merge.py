# SPDX-License-Identifier: Apache-2.0
"""Folding factors into a weight without touching a pruned place."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .bitmask import Compressed, one_of_stack, stored_places
from .compressed import decompress
from .factors import Factors, check_factors, check_stack, factors_of_each
from .kernels.cpu.bitmask import scaled_values
from .weight import scaled_weight


def merged_weight(weight: torch.Tensor, factors: Sequence[Factors]) -> torch.Tensor:
    """
    W' = W ⊙ (1 + Σ s · P(A) ⊙ B) as a weight to keep, with every pruned place exactly +0.0.

    Computed in float32 (float64 for a float64 weight) and rounded once to the dtype of `weight`, so that it is the
    weight which [`spp_linear`] uses. Three things are true of the result that the formula alone does not give:

    - a place that is zero in `weight` is +0.0, also where the factor is infinite or not a number;
    - there is no -0.0 (a negative factor makes one; negative zeros have broken 2:4 kernels);
    - a non-finite value stands only where `weight` is not zero.

    Args:
        weight (`torch.Tensor`): W, shape `(m, n)`, or a stack of weights `(E, m, n)`.
        factors (`Sequence[Factors]`): The factors of the adapters to merge.

    Returns:
        `torch.Tensor`: A new tensor with the shape, dtype and strides of `weight`.

    Raises:
        ValueError: If the shapes of the factors do not fit.
    """
    with torch.no_grad():
        # -0.0 + 0.0 is +0.0: this is for negative zeros of the base weight and of products that underflowed
        merged = scaled_weight(weight, factors).add_(0.0)
        if not _are_finite(factors):
            merged.masked_fill_(weight == 0, 0.0)
    return merged


def merged_compressed(weight: Compressed, factors: Sequence[Factors], *, inputs_first: bool = False) -> Compressed:
    """
    [`merged_weight`] of a weight without its zeros: other values in the same places.

    A value that becomes zero, by underflow or by a factor of -1, stays stored, so that the bitmask is the same.

    Args:
        weight ([`Compressed`]): W, shape `(m, n)`, or a stack of weights `(E, m, n)`.
        factors (`Sequence[Factors]`): The factors of the adapters to merge.
        inputs_first (`bool`): Whether a stack has its weights as `(n, m)`.

    Returns:
        [`Compressed`]: With a new vector of values, and the tensors of `weight` for the rest.

    Raises:
        ValueError: If the shapes of the factors do not fit the weight.
    """
    with torch.no_grad():
        if len(weight.shape) == 2:
            check_factors(weight, factors)
            return weight._replace(values=scaled_values(weight, factors))
        check_stack(weight, factors, inputs_first)
        values = torch.empty_like(weight.values)
        for index, own in enumerate(factors_of_each(factors, weight.shape[0])):
            one = one_of_stack(weight, index)
            if inputs_first:
                merged = merged_weight(decompress(one).mT, own).mT
                values[one.row_offsets[0] : one.row_offsets[-1]] = merged[stored_places(one)]
            else:
                scaled_values(one, own, out=values)
        return weight._replace(values=values)


def _are_finite(factors: Sequence[Factors]) -> bool:
    """Whether zero times the factors is zero. It is not if one is infinite or NaN, also only once it is scaled."""
    # scaled in their own dtype, which is no wider than the one W' is computed in and overflows no later
    return all(bool(torch.isfinite(t).all()) for A, B, s in factors for t in (A, B * s))
