# SPDX-License-Identifier: Apache-2.0
"""The SPP math on plain tensors: no module, no PEFT.

`W' = W ⊙ (1 + Σ s · P(A) ⊙ B)` (SPP, Lu et al. 2024, https://arxiv.org/abs/2405.16057, equation 4).
"""

from .bitmask import Compressed
from .compressed import compressed_linear, compressed_weight
from .dequantized import spp_linear_dequantized
from .factors import Factors
from .linear import spp_linear
from .merge import merged_compressed, merged_weight
from .row_blocks import expand_row_blocks, row_block_index
from .weight import scaled_weight


__all__ = [
    "Compressed",
    "Factors",
    "compressed_linear",
    "compressed_weight",
    "expand_row_blocks",
    "merged_compressed",
    "merged_weight",
    "row_block_index",
    "scaled_weight",
    "spp_linear",
    "spp_linear_dequantized",
]
