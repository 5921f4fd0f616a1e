# SPDX-License-Identifier: Apache-2.0
"""torchao: a `torch.nn.Linear` whose weight is a tensor subclass."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from .backend import Backend


class Torchao(Backend):
    """
    Any weight that is a `torchao.utils.TorchAOBaseTensor` and can be dequantized.

    W' is made from the dequantized weight, so that of torchao's operators none but `dequantize` is needed. The integer
    formats are symmetric, or have an integer zero point within their range, so that zeros stay zeros. Int4 layouts
    that only a GPU kernel can pack are not quantized again.
    """

    package = "torchao"

    def matches(self, layer: nn.Module) -> bool:
        utils = sys.modules.get("torchao.utils")
        return (
            utils is not None
            and isinstance(layer, nn.Linear)
            and isinstance(getattr(layer, "weight", None), utils.TorchAOBaseTensor)
            and hasattr(layer.weight, "dequantize")
        )

    def kind(self, layer: Any) -> str:
        bits = getattr(layer.weight, "target_dtype", None)
        return f"torchao {type(layer.weight).__name__}" + (f" {bits}".replace("torch.", "") if bits else "")

    def packed(self, layer: Any) -> Any:
        return layer.weight

    def dequantize(self, layer: nn.Module, packed: Any) -> torch.Tensor:
        weight: torch.Tensor = packed.detach().dequantize()
        return weight

    def quantize(self, layer: Any, weight: torch.Tensor) -> nn.Parameter:
        old = layer.weight
        quantize = {"Int8Tensor": _int8_like, "IntxUnpackedToInt8Tensor": _intx_like}.get(type(old).__name__)
        if quantize is None:
            raise ValueError(f"weights of torchao's {type(old).__name__} cannot be quantized again")
        return nn.Parameter(quantize(old, weight), requires_grad=False)

    def put(self, layer: Any, packed: Any) -> None:
        device = layer.weight.device
        layer.weight = packed if packed.device == device else nn.Parameter(packed.to(device), requires_grad=False)


def _int8_like(old: Any, weight: torch.Tensor) -> Any:
    from torchao.quantization import PerRow, PerTensor
    from torchao.quantization.granularity import PerGroup

    rows, columns = old.block_size
    if columns != weight.shape[1]:
        granularity: Any = PerGroup(columns)
    else:
        granularity = PerRow() if rows == 1 else PerTensor()
    return type(old).from_hp(
        weight,
        granularity,
        mapping_type=_mapping_type(old),
        act_quant_kwargs=old.act_quant_kwargs,
        act_quant_scale=old.act_quant_scale,
        act_quant_zero_point=old.act_quant_zero_point,
        act_pre_scale=old.act_pre_scale,
    )


def _intx_like(old: Any, weight: torch.Tensor) -> Any:
    return type(old).from_hp(
        weight,
        old.block_size,
        old.target_dtype,
        mapping_type=_mapping_type(old),
        activation_quantization=old.activation_quantization,
    )


def _mapping_type(old: Any) -> Any:
    from torchao.quantization.quant_primitives import MappingType

    is_symmetric = old.zero_point is None or not bool(old.zero_point.any())
    return MappingType.SYMMETRIC if is_symmetric else MappingType.ASYMMETRIC
