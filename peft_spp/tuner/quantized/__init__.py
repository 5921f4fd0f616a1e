# SPDX-License-Identifier: Apache-2.0
"""SPP on quantized base layers: one interface, a backend a file."""

from .backend import Backend
from .by_unit_vectors import Applied
from .conversion import follow_base_layer
from .dequantized_loading import how_to_dequantize
from .layer import QuantizedLinear
from .registry import dequantized_weight, find_backend, is_foreign, register_backend
from .unload import unload_dequantized


__all__ = [
    "Applied",
    "Backend",
    "QuantizedLinear",
    "dequantized_weight",
    "find_backend",
    "follow_base_layer",
    "how_to_dequantize",
    "is_foreign",
    "register_backend",
    "unload_dequantized",
]
