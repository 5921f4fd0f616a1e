# SPDX-License-Identifier: Apache-2.0
"""Quantized layers of other packages, whose weight is read off what they do to the unit vectors."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import nn

from ...architecture import FLOATING
from .backend import Backend
from .dequantized_loading import how_to_dequantize


# how many unit vectors at a time
_ROWS = 1024
# how far a layer that rounds its input to 8 bits may be from a linear map
_TOLERANCE = 0.1


class Applied(Backend):
    """
    Any linear layer of a package, read by probing it: the weight is what the layer makes of the unit vectors.

    It needs no more of the layer than its call, `in_features` and `out_features`, and costs a call with `in_features`
    tokens. Every product is one weight times one, so nothing is rounded but the sum with the bias; a zero is exact.
    The weight cannot be quantized again.

    Args:
        package (`str`): The package, or a module of it, that defines the classes of the layers.
    """

    def __init__(self, package: str) -> None:
        self.package = package

    def matches(self, layer: nn.Module) -> bool:
        sizes = (getattr(layer, "in_features", None), getattr(layer, "out_features", None))
        is_ours = f"{type(layer).__module__}.".startswith(f"{self.package}.")
        return is_ours and all(isinstance(size, int) for size in sizes)

    def kind(self, layer: nn.Module) -> str:
        return f"{self.package} {type(layer).__name__}"

    @torch.no_grad()
    def check(self, layer: Any) -> None:
        x = torch.randn(1, layer.in_features).to(_floating_tensor(layer))
        try:
            weight, at_zero = self.dequantize(layer, None), layer.forward(torch.zeros_like(x))
            actual = layer.forward(x)
        except Exception as error:  # whatever its kernels raise
            hint = how_to_dequantize(layer)
            raise ValueError(
                f"its weight is read by calling it, and {type(layer).__module__}.{type(layer).__name__} raises "
                f"{type(error).__name__} here ({error})" + (f"; {hint}" if hint else "")
            ) from error
        expected = x @ weight.t() + at_zero
        if not (actual - expected).norm() <= _TOLERANCE * (expected - at_zero).norm():
            raise ValueError(
                f"{type(layer).__module__}.{type(layer).__name__} is not a linear map: it has no weight to scale"
            )

    def packed(self, layer: nn.Module) -> None:
        return None

    @torch.no_grad()
    def dequantize(self, layer: Any, packed: None) -> torch.Tensor:
        n = layer.in_features
        like = _floating_tensor(layer)
        columns = []
        for start in range(0, n, _ROWS):
            units = torch.zeros(min(_ROWS, n - start), n, dtype=like.dtype, device=like.device)
            units[range(len(units)), range(start, start + len(units))] = 1.0
            columns.append(layer.forward(units))
        at_zero = layer.forward(torch.zeros(1, n, dtype=like.dtype, device=like.device))
        return (torch.cat(columns) - at_zero).t().contiguous()

    def quantize(self, layer: nn.Module, weight: torch.Tensor) -> None:
        raise ValueError(f"the weights of {type(layer).__module__}.{type(layer).__name__} cannot be quantized again")

    def put(self, layer: nn.Module, packed: None) -> None:
        raise ValueError(f"the weights of {type(layer).__module__}.{type(layer).__name__} cannot be replaced")


def _floating_tensor(layer: nn.Module) -> torch.Tensor:
    """A tensor of the layer, usually its scales, of the dtype that it computes in."""
    tensors = chain(layer.parameters(), layer.buffers())
    # not a weight in float8, in which nothing is computed
    return next((t for t in tensors if t.dtype in FLOATING), torch.empty(0))
