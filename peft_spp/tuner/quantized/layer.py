# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from ...functional import Compressed, merged_weight
from ...functional.autograd import autocasts
from ..engines import whole_parameters
from ..layer import Linear
from .backend import Backend


class QuantizedLinear(Linear):
    """
    SPP on a linear layer with a quantized weight: W' = W ⊙ (1 + s · P(A) ⊙ B) with W the dequantized weight.

    The weight is dequantized in the forward pass and once more in the backward pass, and nothing of its size is kept
    in between.

    Args:
        base_layer (`nn.Module`): The layer to adapt, or a tuner layer around one.
        adapter_name (`str`): The name of the first adapter.
        backend ([`Backend`]): How to read and replace the base layer's weight.
        kwargs (`Any`): As for [`Linear`].
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, backend: Backend, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        self.backend = backend
        # the packed weight as it was before any merge, while an adapter is merged
        self._unmerged_packed: Any = None

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
        base_layer = self.get_base_layer()
        if any(parameter.is_meta for parameter in base_layer.parameters(recurse=False)):
            return torch.empty(self.out_features, self.in_features, device="meta")
        if self.merged_adapters:
            return self.backend.dequantize(base_layer, self._unmerged_packed)
        return self._dequantized_weight()

    def recorded_weight(self) -> torch.Tensor | Compressed:
        if not self.quantizes:
            base_layer = self.get_base_layer()
            packed = self._unmerged_packed if self.merged_adapters else self.backend.packed(base_layer)
            if isinstance(packed, Compressed):
                return packed
        return self.unmerged_weight()

    def _dequantized_weight(self) -> torch.Tensor:
        base_layer = self.get_base_layer()
        return self.backend.dequantize(base_layer, self.backend.packed(base_layer))

    def _is_computed_with(self) -> bool:
        # only a weight that looks like a matrix of numbers can be; a packed one is read for what it says of itself
        weight = getattr(self.get_base_layer(), "weight", None)
        shape = (self.out_features, self.in_features)
        is_matrix = isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.shape == shape
        return is_matrix and super()._is_computed_with()

    def _effective_weight(self, names: Sequence[str]) -> torch.Tensor:
        return self.backend.scaled(self.get_base_layer(), self.get_factors(names))

    def merge_dequantized(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> torch.Tensor:
        """
        The dequantized weight with adapters merged into it.

        Args:
            adapter_names (`list[str]`, *optional*):
                The adapters to merge in addition to those already merged, by default the active ones.
            safe_merge (`bool`): Whether to check that the result is finite.

        Returns:
            `torch.Tensor`: shape (out_features, in_features); the layer is not changed.

        Raises:
            ValueError: If `safe_merge` is set and the merged weight is not finite.
        """
        new_adapters = self._new_adapters(adapter_names)
        merged = self._merged_weight([*self.merged_adapters, *new_adapters])
        if safe_merge:
            self._check_merged_weight(merged, new_adapters)
        return merged

    def check_merge(self, adapter_names: list[str] | None = None) -> None:
        """
        Raise the error of a merge without merging.

        Args:
            adapter_names (`list[str]`, *optional*): The adapters to merge, by default the active ones.

        Raises:
            ValueError: If the merged weight would not be finite, or quantizing it would lose a zero.
        """
        new_adapters = self._new_adapters(adapter_names)
        if new_adapters and self.quantizes:
            self._quantize_merged(new_adapters)
        elif new_adapters:
            with whole_parameters(self):
                self._merged_packed(new_adapters, safe_merge=True)

    def _merge(self, safe_merge: bool, adapter_names: list[str] | None, keep_unmerged: bool) -> None:
        new_adapters = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.spp_A]
        if not new_adapters:
            # no adapter to merge
            return
        self.check_writable()
        if not self.quantizes:
            self._merge_lossless(new_adapters, safe_merge, keep_unmerged)
            return
        packed = self._quantize_merged(new_adapters)
        warnings.warn(
            f"Merge spp module to a quantized linear ({self.quantization}) may get different generations due to "
            "rounding errors.",
            stacklevel=2,
        )
        base_layer = self.get_base_layer()
        if keep_unmerged and not self.merged_adapters:
            self._unmerged_packed = self.backend.packed(base_layer)
        self.backend.put(base_layer, packed)
        self.merged_adapters.extend(new_adapters)

    def unmerge(self) -> None:
        """
        This method unmerges all merged adapter layers from the base weights, restoring the quantized data bit for bit.
        """
        if not self.merged_adapters:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.check_writable()
        with self._whole_base_layer():
            self.backend.put(self.get_base_layer(), self._unmerged_packed)
        self._unmerged_packed = None
        self.merged_adapters.clear()

    def _new_adapters(self, adapter_names: list[str] | None) -> list[str]:
        names = self.active_adapters if adapter_names is None else adapter_names
        return [name for name in names if name in self.spp_A and name not in self.merged_adapters]

    def _merged_weight(self, adapter_names: Sequence[str]) -> torch.Tensor:
        weight = self.unmerged_weight()
        return merged_weight(weight, self.get_factors(adapter_names)) if adapter_names else weight

    def _merge_lossless(self, new_adapters: list[str], safe_merge: bool, keep_unmerged: bool) -> None:
        if keep_unmerged:
            self.check_merge_stays()
        base_layer = self.get_base_layer()
        with self._whole_base_layer():
            packed = self._merged_packed(new_adapters, safe_merge)
            if keep_unmerged and not self.merged_adapters:
                # the values are written in place, where an engine that shards them finds them
                self._unmerged_packed = self.backend.copy(self.backend.packed(base_layer))
            self.backend.put(base_layer, packed)
        self.merged_adapters.extend(new_adapters)

    def _merged_packed(self, new_adapters: list[str], safe_merge: bool) -> Any:
        unmerged = self._unmerged_packed if self.merged_adapters else self.backend.packed(self.get_base_layer())
        packed, values = self.backend.merged(unmerged, self.get_factors([*self.merged_adapters, *new_adapters]))
        if safe_merge:
            self._check_merged_weight(values, new_adapters)
        return packed

    def _whole_base_layer(self) -> AbstractContextManager[None]:
        # packages that quantize keep their weights whole
        return nullcontext() if self.quantizes else whole_parameters(self, write=True)

    def _quantize_merged(self, new_adapters: list[str]) -> Any:
        """The packed merged weight, checked: it is finite and every zero of the base layer is kept."""
        base_layer = self.get_base_layer()
        merged = self._merged_weight([*self.merged_adapters, *new_adapters])
        # always, not only for a safe merge: a value that is not finite takes the zeros of its block with it
        self._check_merged_weight(merged, new_adapters)
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
        result = self.backend.linear(self.get_base_layer(), x, bias, self.get_factors(adapter_names), identity)
        return result if autocasts(x.device.type) else result.to(x.dtype)

    def _is_linear_map(self, forward: Callable[..., torch.Tensor]) -> bool:
        # either the base layer itself, or its class's forward pass bound to it
        base_layer = self.get_base_layer()
        is_its_own = getattr(forward, "__func__", None) is type(base_layer).forward
        return (forward is base_layer or is_its_own) and self.backend.forward_is_known(base_layer)


def plain_linear(layer: nn.Module, weight: torch.Tensor, dtype: torch.dtype) -> nn.Linear:
    """
    A `torch.nn.Linear` in place of a quantized layer.

    Args:
        layer (`nn.Module`): The quantized layer, for its bias and its mode.
        weight (`torch.Tensor`): The weight, shape (out_features, in_features).
        dtype (`torch.dtype`): The dtype of the new layer.

    Returns:
        `nn.Linear`: A new layer, frozen.
    """
    bias = getattr(layer, "bias", None)
    out_features, in_features = weight.shape
    with torch.device("meta"):
        plain = nn.Linear(in_features, out_features, bias=bias is not None)
    plain.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().to(dtype, copy=True), requires_grad=bias.requires_grad)
    return plain.train(layer.training)
