# SPDX-License-Identifier: Apache-2.0
"""A model without quantization, out of one with it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from .layer import QuantizedLinear, plain_linear
from .registry import dequantized_weight, find_backend


def unload_dequantized(model: nn.Module, adapter_names: list[str] | None, safe_merge: bool) -> None:
    """
    Replace every quantized linear layer by a plain one in the dtype of the model's other parameters, with the adapters
    merged into those that are adapted. `safe_merge` checks first that every merged weight is finite.
    """
    layers = list(_quantized_layers(model))
    if safe_merge:
        for _, layer in layers:
            if isinstance(layer, QuantizedLinear):
                layer.merge_dequantized(adapter_names, safe_merge=True)
    dtype = _dtype_of_the_rest(model, [name for name, _ in layers])
    for name, layer in layers:
        if isinstance(layer, QuantizedLinear):
            base_layer, weight = layer.get_base_layer(), layer.merge_dequantized(adapter_names)
        else:
            base_layer, weight = layer, dequantized_weight(layer)
        model.set_submodule(name, plain_linear(base_layer, weight, dtype or weight.dtype))
    _forget_quantization(model)


def _quantized_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The quantized layers, the adapted ones with their adapters."""
    inside = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        if isinstance(module, QuantizedLinear) or find_backend(module) is not None:
            inside = f"{name}."
            yield name, module


def _dtype_of_the_rest(model: nn.Module, quantized_layers: list[str]) -> torch.dtype | None:
    """The dtype of the parameters that are neither in a quantized layer nor an adapter's."""
    quantized = tuple(f"{name}." for name in quantized_layers)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and ".spp_" not in name and not name.startswith(quantized):
            return parameter.dtype
    return None


def _forget_quantization(model: nn.Module) -> None:
    """Take away what Transformers keeps of the quantization, so that the model saves and loads as a plain one."""
    config = getattr(model, "config", None)
    for owner, name in (
        (config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model, "is_loaded_in_4bit"),
        (model, "is_loaded_in_8bit"),
    ):
        if name in getattr(owner, "__dict__", {}):
            delattr(owner, name)
    if hasattr(model, "is_quantized"):
        model.is_quantized = False  # type: ignore[assignment]
