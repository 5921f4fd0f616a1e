# SPDX-License-Identifier: Apache-2.0
"""Linear layers whose zeros are not stored, and how Transformers loads and saves them."""

from .config import BitmaskConfig
from .in_memory import compress, decompress
from .layer import CompressedLinear
from .quantizer import BitmaskHfQuantizer
from .registration import register


__all__ = ["BitmaskConfig", "BitmaskHfQuantizer", "CompressedLinear", "compress", "decompress", "register"]
