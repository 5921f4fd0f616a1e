# SPDX-License-Identifier: Apache-2.0
"""How Transformers loads a model without its quantization, where layers cannot be adapted as they are."""

from __future__ import annotations

from inspect import signature

from torch import nn
from transformers import CompressedTensorsConfig


# by the module that defines the layers
_CONFIGS = {
    "transformers.integrations.compressed_tensors": "CompressedTensorsConfig",
    "transformers.integrations.finegrained_fp8": "FineGrainedFP8Config",
    "transformers.integrations.gguf": "GgufConfig",
    "transformers.integrations.metal_quantization": "MetalConfig",
}


def how_to_dequantize(layer: nn.Module) -> str | None:
    """What to pass to `from_pretrained` so that a plain layer is loaded in the place of a quantized one."""
    place = f"{type(layer).__module__}."
    config = next((config for module, config in _CONFIGS.items() if place.startswith(f"{module}.")), None)
    # what compressed-tensors sets on plain layers, whose weights it packs
    if config is None and hasattr(layer, "quantization_scheme"):
        config = "CompressedTensorsConfig"
    if config is None:
        return None
    # the same in older versions of Transformers
    has_option = config != "CompressedTensorsConfig" or "dequantize" in signature(CompressedTensorsConfig).parameters
    option = "dequantize=True" if has_option else "run_compressed=False"
    return f"load the base model dequantized, with `quantization_config={config}({option})`"
