# SPDX-License-Identifier: Apache-2.0
"""HQQ: groups with a zero point that is not an integer, so that there is no code for 0 in general."""

from __future__ import annotations

import copy
import sys
from typing import Any, NamedTuple

import torch
from torch import nn

from .backend import Backend


class _Packed(NamedTuple):
    codes: nn.Parameter
    meta: dict[str, Any]


class Hqq(Backend):
    """`hqq.core.quantize.HQQLinear`. Quantizing a pruned weight with it makes most zeros small numbers."""

    package = "hqq"

    def matches(self, layer: nn.Module) -> bool:
        quantize = sys.modules.get("hqq.core.quantize")
        return quantize is not None and isinstance(layer, quantize.HQQLinear) and layer.ready

    def kind(self, layer: Any) -> str:
        return f"hqq {layer.meta['nbits']} bits"

    def packed(self, layer: Any) -> _Packed:
        return _Packed(layer.W_q, layer.meta)

    def dequantize(self, layer: Any, packed: _Packed) -> torch.Tensor:
        from hqq.core.quantize import Quantizer

        weight: torch.Tensor = Quantizer.dequantize(packed.codes, packed.meta)
        return weight

    def quantize(self, layer: Any, weight: torch.Tensor) -> _Packed:
        from hqq.core.quantize import HQQLinear

        settings = {**copy.deepcopy(layer.quant_config), "offload_meta": layer.offload_meta}
        new = HQQLinear(None, settings, compute_dtype=layer.compute_dtype, device=layer.device)
        new.quantize(weight, **{name: value for name, value in settings.items() if name != "offload_meta"})
        return _Packed(new.W_q, new.meta)

    def put(self, layer: Any, packed: _Packed) -> None:
        layer.W_q, layer.meta = packed

    def input_dtype(self, layer: Any, x: torch.Tensor) -> torch.dtype:
        dtype: torch.dtype = layer.compute_dtype
        return dtype
