# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes: NF4 and FP4, with and without double quantization, and LLM.int8."""

from __future__ import annotations

import copy
import sys
from typing import Any, NamedTuple

import torch
from torch import nn

from .backend import Backend


class Bnb4bit(Backend):
    """`bitsandbytes.nn.Linear4bit`. NF4 and FP4 both have a code for 0, so that zeros stay zeros."""

    package = "bitsandbytes"

    def matches(self, layer: nn.Module) -> bool:
        bnb = sys.modules.get("bitsandbytes")
        return bnb is not None and isinstance(layer, bnb.nn.Linear4bit)

    def kind(self, layer: Any) -> str:
        double = " with double quantization" if layer.weight.compress_statistics else ""
        return f"bitsandbytes {layer.weight.quant_type}{double}"

    def packed(self, layer: Any) -> Any:
        if getattr(layer.weight, "quant_state", None) is None and layer.quant_state is not None:
            from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module

            fix_4bit_weight_quant_state_from_module(layer)  # as its forward method does: FSDP drops the state
        return layer.weight

    def dequantize(self, layer: Any, packed: Any) -> torch.Tensor:
        from bitsandbytes import functional

        data, state = packed.data, packed.quant_state
        if state is None:
            return data.clone()  # bitsandbytes quantizes when the layer is first moved to a device
        if getattr(state, "packing_format_for_cpu", False):
            # its kernel for CPUs with AVX-512 reorders the weight and its scales at the first call in eval mode
            scales = state.absmax.t().reshape(-1).float()
            data, state = functional._convert_weight_packed_for_cpu_inverse(data, copy.copy(state))
            state.absmax, state.nested = scales, False  # bitsandbytes leaves them out, or quantizes them once more
        weight: torch.Tensor = functional.dequantize_4bit(data, state)
        return weight

    def quantize(self, layer: Any, weight: torch.Tensor) -> Any:
        from bitsandbytes.nn import Params4bit

        old = self.packed(layer)
        new: Any = Params4bit(
            weight,
            requires_grad=False,
            blocksize=old.blocksize,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
        )
        return new.to(weight.device)

    def put(self, layer: Any, packed: Any) -> None:
        device = layer.weight.device
        layer.weight = packed if packed.device == device else packed.to(device)
        layer.weight.module = layer
        layer.quant_state = layer.weight.quant_state

    def input_dtype(self, layer: Any, x: torch.Tensor) -> torch.dtype:
        dtype: torch.dtype | None = layer.compute_dtype
        return x.dtype if dtype is None else dtype


class _Int8(NamedTuple):
    codes: torch.Tensor
    row_maxima: torch.Tensor | None  # None before bitsandbytes has quantized


class Bnb8bit(Backend):
    """
    `bitsandbytes.nn.Linear8bitLt` with `has_fp16_weights=False`. Rows are scaled by their largest magnitude, so that
    zeros stay zeros. W' is made from the dequantized weight, and the matmul is an ordinary one: activations are not
    rounded to int8, so that there are no outliers to take apart.
    """

    package = "bitsandbytes"

    def matches(self, layer: nn.Module) -> bool:
        bnb = sys.modules.get("bitsandbytes")
        return bnb is not None and isinstance(layer, bnb.nn.Linear8bitLt) and not layer.state.has_fp16_weights

    def kind(self, layer: nn.Module) -> str:
        return "bitsandbytes int8"

    def packed(self, layer: Any) -> _Int8:
        # the first call of the layer moves them from the parameter to the state
        maxima = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
        return _Int8(layer.weight.data, maxima)

    def dequantize(self, layer: nn.Module, packed: _Int8) -> torch.Tensor:
        from bitsandbytes import functional

        if packed.row_maxima is None:
            return packed.codes.clone()  # bitsandbytes quantizes when the layer is first moved to a device
        maxima = packed.row_maxima.to(packed.codes.device)
        weight: torch.Tensor = functional.int8_vectorwise_dequant(packed.codes, maxima)
        return weight

    def quantize(self, layer: nn.Module, weight: torch.Tensor) -> _Int8:
        from bitsandbytes import functional

        codes, maxima, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        return _Int8(codes, maxima)

    def put(self, layer: Any, packed: _Int8) -> None:
        from bitsandbytes.nn import Int8Params

        device = layer.weight.device
        codes, maxima = (None if t is None else t.to(device) for t in packed)
        layer.weight = Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=maxima)
        layer.state.reset_grads()
