# SPDX-License-Identifier: Apache-2.0
"""Linear layers and experts whose zeros are not stored, and how Transformers loads and saves them."""

from .checkpoint_run import compress_checkpoint, decompress_checkpoint
from .config import BitmaskConfig
from .experts import CompressedExperts
from .in_memory import compress, decompress
from .layer import CompressedLinear
from .quantizer import BitmaskHfQuantizer
from .registration import register
from .report import CompressedModule, CompressionReport


__all__ = [
    "BitmaskConfig",
    "BitmaskHfQuantizer",
    "CompressedExperts",
    "CompressedLinear",
    "CompressedModule",
    "CompressionReport",
    "compress",
    "compress_checkpoint",
    "decompress",
    "decompress_checkpoint",
    "register",
]
