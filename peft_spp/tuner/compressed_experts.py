# SPDX-License-Identifier: Apache-2.0
"""How SPP reads and replaces the weights of experts that are stored without their zeros."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..compressed.experts import CompressedExperts
from ..functional import Compressed, Factors, merged_compressed
from ..functional.bitmask import stored_places
from ..functional.compressed import decompress
from .engines import innermost, whole_shape
from .weight_access import Plain


class CompressedStackAccess(Plain):
    """
    A stack of a [`~peft_spp.compressed.experts.CompressedExperts`]. A merge gives it other values in the same places.
    """

    def kind(self, layer: nn.Module) -> str:
        return "bitmask"

    def packed(self, layer: nn.Module) -> Any:
        stack = _experts(layer).compressed(self.parameter_name)
        return stack._replace(values=stack.values.detach())

    def dequantize(self, layer: nn.Module, packed: Any) -> Tensor:
        if packed.values.is_meta:  # it is offloaded
            return self.rows(torch.empty(packed.shape, dtype=packed.values.dtype, device="meta"))
        return self.rows(decompress(_at_home(packed)))

    def quantize(self, layer: nn.Module, weight: Tensor) -> Any:
        stack = _experts(layer).compressed(self.parameter_name)
        return stack._replace(values=self.stored(weight)[stored_places(stack)])

    def put(self, layer: nn.Module, packed: Any) -> None:
        super().put(layer, packed.values)

    def copy(self, packed: Any) -> Any:
        return packed._replace(values=packed.values.to("cpu", copy=True))

    def merged(self, layer: nn.Module, packed: Any, factors: Sequence[Factors]) -> Any:
        return merged_compressed(_at_home(packed), factors, inputs_first=self.is_transposed)

    def numbers(self, packed: Any) -> Tensor:
        values: Tensor = packed.values
        return values

    def scaled(self, layer: nn.Module, factors: Sequence[Factors]) -> Tensor:
        return self.replacement(layer, factors)(self._parameter(layer))

    def replacement(self, module: nn.Module, factors: Sequence[Factors]) -> Callable[[Tensor], Tensor]:
        return lambda _: _experts(module).stack(self.parameter_name, factors, inputs_first=self.is_transposed)


def access_to_parameter(layer: nn.Module, name: str, is_transposed: bool) -> Plain:
    """How to read and replace a parameter of a module."""
    return (CompressedStackAccess if is_compressed_stack(layer, name) else Plain)(name, is_transposed)


def is_compressed_stack(layer: nn.Module, name: str) -> bool:
    """Whether a parameter of a module has the values of a compressed stack."""
    module = innermost(layer)
    return isinstance(module, CompressedExperts) and name in module.stacks


def parameter_shape(layer: nn.Module, name: str) -> tuple[int, ...]:
    """The shape of a parameter of a module when it is whole, and with its zeros."""
    if is_compressed_stack(layer, name):
        return tuple(_experts(layer).compressed(name).shape)
    return whole_shape(getattr(layer, name))


def _experts(layer: nn.Module) -> CompressedExperts:
    return cast(CompressedExperts, innermost(layer))


def _at_home(packed: Compressed) -> Compressed:
    return packed._replace(values=packed.values.to(packed.bitmask.device))  # a copy is in host memory
