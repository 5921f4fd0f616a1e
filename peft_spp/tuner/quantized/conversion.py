# SPDX-License-Identifier: Apache-2.0
"""Layers whose base layer is quantized once they have an adapter."""

from __future__ import annotations

import torch

from ..layer import AdaptedLayer, Linear
from .layer import QuantizedLinear
from .registry import find_backend, is_foreign


def follow_base_layer(layer: AdaptedLayer) -> None:
    """
    Turn a layer on a plain weight into one on a quantized weight, if its base layer has been quantized in place, as
    `torchao.quantize_` does. An error if the new weight cannot be adapted, an adapter is merged into it, or the
    factors are quantized too.
    """
    base_layer = layer.get_base_layer()
    weight = getattr(base_layer, layer.parameter_name, None)
    backend = find_backend(base_layer)
    if backend is None and isinstance(weight, torch.Tensor) and not is_foreign(weight):
        return  # such as a shard of FSDP2
    name = f"Module {layer.module_name!r} ({type(base_layer).__name__}, {type(weight).__name__})"
    if backend is None or type(layer) is not Linear:
        raise ValueError(
            f"{name} was quantized or replaced after the adapter was added, which SPP does not support there. "
            "Quantize the base model first, then add the adapter."
        )
    if layer.merged:
        raise ValueError(
            f"{name} was quantized while an adapter is merged into it, and cannot be unmerged. Call "
            "`unmerge_adapter` before you quantize the base layers."
        )
    factors = [tensor for adapter in layer.spp_A for tensor in layer._factors(adapter)]
    if any(is_foreign(tensor) for tensor in factors):
        raise ValueError(
            f"{name}: the factors of the adapter were quantized too. Quantize only the base layers, for example with "
            "`filter_fn=lambda module, name: name.endswith('base_layer')` in `torchao.quantize_`."
        )
    try:
        backend.check(base_layer)
    except ValueError as error:
        raise ValueError(f"{name} is not supported: {error}.") from error
    layer.__class__ = QuantizedLinear
    assert isinstance(layer, QuantizedLinear)
    layer.backend = backend


AdaptedLayer.convert = follow_base_layer
