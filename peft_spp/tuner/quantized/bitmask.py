# SPDX-License-Identifier: Apache-2.0
"""Compressed weights: a bitmask and the values that are not zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...compressed import CompressedLinear
from ...functional import Compressed, Factors, compressed_linear, compressed_weight, merged_compressed
from ...functional.bitmask import stored_places
from ...functional.compressed import decompress
from .backend import Backend


class Bitmask(Backend):
    """[`~peft_spp.CompressedLinear`]. A merge gives it other values in the same places."""

    package = "peft_spp"
    is_lossless = True

    def matches(self, layer: nn.Module) -> bool:
        return isinstance(layer, CompressedLinear)

    def kind(self, layer: nn.Module) -> str:
        return "bitmask"

    def packed(self, layer: Any) -> Compressed:
        compressed: Compressed = layer.compressed
        return compressed._replace(values=compressed.values.detach())

    def dequantize(self, layer: nn.Module, packed: Compressed) -> torch.Tensor:
        return decompress(packed._replace(values=packed.values.to(packed.bitmask.device)))

    def quantize(self, layer: Any, weight: torch.Tensor) -> Compressed:
        compressed: Compressed = layer.compressed
        places = stored_places(compressed)
        if (weight[~places] != 0).any():
            raise ValueError("the weight is not zero where the compressed layer stores nothing")
        return compressed._replace(values=weight[places])

    def put(self, layer: Any, packed: Compressed) -> None:
        # in place: an engine that shards parameters, and whoever holds this one, sees the new values
        layer.weight.data.copy_(packed.values)

    def copy(self, packed: Compressed) -> Compressed:
        return packed._replace(values=packed.values.to("cpu", copy=True))

    def linear(
        self,
        layer: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        factors: Sequence[Factors],
        identity: bool = True,
    ) -> torch.Tensor:
        return compressed_linear(x, layer.compressed, bias, factors, identity=identity)

    def scaled(self, layer: Any, factors: Sequence[Factors]) -> torch.Tensor:
        return compressed_weight(layer.compressed, factors)

    def merged(self, layer: nn.Module, packed: Compressed, factors: Sequence[Factors]) -> Compressed:
        packed = packed._replace(values=packed.values.to(packed.bitmask.device))  # a copy is in host memory
        return merged_compressed(packed, factors)

    def numbers(self, packed: Compressed) -> torch.Tensor:
        return packed.values
