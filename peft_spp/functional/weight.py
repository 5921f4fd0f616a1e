# SPDX-License-Identifier: Apache-2.0
"""The effective weight W'."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .factors import Factors, check_factors
from .kernels import composite, schema  # noqa: F401  (schema defines the operators)


def scaled_weight(
    weight: torch.Tensor,
    factors: Sequence[Factors],
    *,
    identity: bool = True,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """
    W' = W ⊙ (1 + Σ s · P(A) ⊙ B), SPP's equation 4, or with `identity=False` only the update W ⊙ Σ s · P(A) ⊙ B.

    Computed in float32 (float64 if any input is float64) as `w + Σ s·b · (w·a)` and rounded once, to `dtype`. It is
    the weight that [`spp_linear`] multiplies by, bit for bit.

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
    dtype = dtype or weight.dtype
    if torch.is_grad_enabled():
        return composite.scaled_weight(weight, factors, identity, dtype)
    A, B, scaling = [f.A for f in factors], [f.B for f in factors], [float(f.scaling) for f in factors]
    result: torch.Tensor = torch.ops.peft_spp.scaled_weight(weight, A, B, scaling, identity, dtype)
    return result
