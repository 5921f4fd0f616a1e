# SPDX-License-Identifier: Apache-2.0
"""
Makes compressed weights a quantization method of Transformers, by its own extension points.

PEFT has none for the layers that its methods adapt or merge, so three of its functions are wrapped with a check, and
so is the one with which Transformers resizes a vocabulary.
"""

from __future__ import annotations

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)

from ..checkpoints.compressed_format import METHOD
from .config import BitmaskConfig
from .old_formats import load_old_formats
from .other_adapters import guard_other_adapters
from .quantizer import BitmaskHfQuantizer
from .resizing import guard_resizing


def register() -> None:
    """
    Register the method with Transformers, and its checks with PEFT. Calling it again is a no-op.

    Raises:
        ImportError: If Transformers, or another package, has a method of this name.
    """
    owner = AUTO_QUANTIZATION_CONFIG_MAPPING.get(METHOD)
    if owner is not None and owner.__module__.partition(".")[0] != __name__.partition(".")[0]:
        raise ImportError(
            f"a quantization method named {METHOD!r} is registered with Transformers already, by "
            f"{owner.__module__}, so peft_spp cannot register its own: import only one of the two packages"
        )
    guard_other_adapters()
    guard_resizing()
    load_old_formats()
    if owner is not None:
        # imported once more in one process (importlib.reload, a purged sys.modules)
        AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = BitmaskConfig
        AUTO_QUANTIZER_MAPPING[METHOD] = BitmaskHfQuantizer
        return
    register_quantization_config(METHOD)(BitmaskConfig)
    register_quantizer(METHOD)(BitmaskHfQuantizer)
