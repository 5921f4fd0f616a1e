# SPDX-License-Identifier: Apache-2.0
"""What the kernels are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..bitmask import Compressed, decompress
from ..factors import Factors


class ScaledWeight(NamedTuple):
    """W' = W ⊙ (1 + Σ s · P(A) ⊙ B), before anything of it is computed.

    Args:
        weight (`torch.Tensor` or [`Compressed`]): W, shape `(m, n)`.
        factors (`Sequence[Factors]`): The factors of each adapter. Only a compressed W may have none.
        identity (`bool`): Whether to include the 1.
        dtype (`torch.dtype`): The dtype of W', and of the matmuls with it.
    """

    weight: torch.Tensor | Compressed
    factors: Sequence[Factors]
    identity: bool
    dtype: torch.dtype

    @property
    def dense(self) -> torch.Tensor:
        """W, which is not compressed."""
        assert isinstance(self.weight, torch.Tensor)
        return self.weight

    def expanded(self) -> ScaledWeight:
        """The same with W as a dense tensor."""
        return self._replace(weight=decompress(self.weight)) if isinstance(self.weight, Compressed) else self
