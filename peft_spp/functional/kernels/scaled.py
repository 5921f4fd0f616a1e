# SPDX-License-Identifier: Apache-2.0
"""What the kernels are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..bitmask import Compressed, decompress
from ..factors import Factors


class ScaledWeight(NamedTuple):
    """W' = W ⊙ (1 + Σ s · P(A) ⊙ B), before anything of it is computed."""

    weight: torch.Tensor | Compressed  # W, shape `(m, n)`
    factors: Sequence[Factors]  # the factors of each adapter. Only a compressed W may have none.
    identity: bool  # whether to include the 1
    dtype: torch.dtype  # the dtype of W', and of the matmuls with it

    @property
    def dense(self) -> torch.Tensor:
        """W, which is not compressed."""
        assert isinstance(self.weight, torch.Tensor)
        return self.weight

    def expanded(self) -> ScaledWeight:
        """The same with W as a dense tensor."""
        return self._replace(weight=decompress(self.weight)) if isinstance(self.weight, Compressed) else self
