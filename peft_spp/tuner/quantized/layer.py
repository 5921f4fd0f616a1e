# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...functional import merged_weight
from ...functional.autograd import autocasts
from ..layer import Linear
from .backend import Backend


class QuantizedLinear(Linear):
    """
    SPP on a linear layer with a quantized weight: W' = W ⊙ (1 + s · P(A) ⊙ B) with W the dequantized weight.

    The weight is dequantized in the forward pass and once more in the backward pass, and nothing of its size is kept
    in between.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, backend: Backend, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, backend=backend, **kwargs)

    def follow_base_layer(self) -> None:
        # the backend reads the weight each time
        pass

    @property
    def quantizes(self) -> bool:
        """Whether the weight is rounded, and a merged one is rounded again."""
        return not self.backend.is_lossless

    @property
    def quantization(self) -> str:
        """How the base layer is quantized, such as `"bitsandbytes nf4"`."""
        return self.backend.kind(self.get_base_layer())

    def unmerged_weight(self) -> torch.Tensor:
        """The dequantized weight as it was before any merge, shape (out_features, in_features)."""
        if any(parameter.is_meta for parameter in self.get_base_layer().parameters(recurse=False)):
            return torch.empty(self.out_features, self.in_features, device="meta")
        return super().unmerged_weight()

    def _is_computed_with(self) -> bool:
        # only a weight that looks like a matrix of numbers can be; a packed one is read for what it says of itself
        weight = getattr(self.get_base_layer(), "weight", None)
        shape = (self.out_features, self.in_features)
        is_matrix = isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.shape == shape
        return is_matrix and super()._is_computed_with()

    def merge_dequantized(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> torch.Tensor:
        """
        The dequantized weight with adapters, by default the active ones, merged into it; the layer is not changed.
        """
        new_adapters = self._new_adapters(adapter_names)
        merged = self._dense_merged(new_adapters)
        if safe_merge:
            self._check_finite(merged, new_adapters)
        return merged

    def _dense_merged(self, new_adapters: list[str]) -> torch.Tensor:
        weight, names = self.unmerged_weight(), [*self.merged_adapters, *new_adapters]
        return merged_weight(weight, self.get_factors(names)) if names else weight

    def _merged(self, new_adapters: list[str], safe_merge: bool) -> Any:
        """The packed merged weight, checked: it is finite and every zero of the base layer is kept."""
        if not self.quantizes:
            return super()._merged(new_adapters, safe_merge)
        base_layer = self.get_base_layer()
        merged = self._dense_merged(new_adapters)
        # always, not only for a safe merge: a value that is not finite takes the zeros of its block with it
        self._check_finite(merged, new_adapters)
        advice = (
            "Nothing was merged. Use `merge_and_unload(dequantize=True)` to get a merged model that is not quantized."
        )
        try:
            packed = self.backend.quantize(base_layer, merged)
        except ValueError as error:
            raise ValueError(f"Cannot merge into module {self.module_name!r}: {error}. {advice}") from error
        quantized = self.backend.dequantize(base_layer, packed)
        if not torch.isfinite(quantized).all():
            raise ValueError(
                f"Cannot merge into module {self.module_name!r} ({self.quantization}): the merged weight is too large "
                f"for the quantized format. {advice}"
            )
        lost = int(((quantized != 0) & (self.unmerged_weight() == 0)).sum())
        if lost:
            raise ValueError(
                f"Cannot merge into module {self.module_name!r} ({self.quantization}): {lost} zero weights would "
                f"become nonzero after quantizing. {advice}"
            )
        return packed

    def _spp_linear(
        self, x: torch.Tensor, adapter_names: Sequence[str], bias: torch.Tensor | None, identity: bool = True
    ) -> torch.Tensor:
        result = super()._spp_linear(x, adapter_names, bias, identity)
        return result if autocasts(x.device.type) else result.to(x.dtype)


def plain_linear(layer: nn.Module, weight: torch.Tensor, dtype: torch.dtype) -> nn.Linear:
    """A frozen `torch.nn.Linear` with this weight, and the bias and the mode of a quantized layer."""
    bias = getattr(layer, "bias", None)
    out_features, in_features = weight.shape
    with torch.device("meta"):
        plain = nn.Linear(in_features, out_features, bias=bias is not None)
    plain.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().to(dtype, copy=True), requires_grad=bias.requires_grad)
    return plain.train(layer.training)
