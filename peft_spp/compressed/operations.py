# SPDX-License-Identifier: Apache-2.0
"""What the operations have in common by which Transformers' loader passes on what it has read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.core_model_loading import ConversionOps


class Operation(ConversionOps):  # type: ignore[misc]
    """An operation that reports to a quantizer."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: Any) -> Operation:
        return self  # the loader copies an operation for each tensor; all report to one quantizer


def one_of(tensors: Tensor | Sequence[Tensor]) -> Tensor:
    """The only tensor that was read of a name."""
    return tensors if isinstance(tensors, Tensor) else tensors[0]


class Compress(Operation):
    """A dense weight, which is compressed."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        result: dict[str, Tensor] = {}
        for name in list(input_dict):
            result |= self.hf_quantizer.compress(kwargs["model"], name, one_of(input_dict.pop(name)))
        return result


class Read(Operation):
    """The weight of a linear layer, compressed or not."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        model, full_layer_name = kwargs["model"], kwargs["full_layer_name"]
        weight, bitmask = (input_dict.get(name) for name in ("weight", "bitmask"))
        if bitmask is None:
            return self.hf_quantizer.read_alone(model, full_layer_name, input_dict)
        return self.hf_quantizer.read(
            model, full_layer_name, None if weight is None else one_of(weight), one_of(bitmask)
        )

    @property
    def reverse_op(self) -> ConversionOps:
        return _Write()


class ReadOld(Operation):
    """A weight in a format that compressed-tensors had."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.hf_quantizer.read_old(kwargs["model"], kwargs["full_layer_name"], input_dict)


class _Write(ConversionOps):  # type: ignore[misc]
    """Values and bitmask are saved as they are in memory."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return input_dict
