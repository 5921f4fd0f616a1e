# SPDX-License-Identifier: Apache-2.0
"""Merging the adapters of a model: checked in all layers first, and listed in the configuration afterward."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from typing import cast

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from ..checkpoints.merged import MERGED, Factor, adapter_id, merged_adapters
from ..compressed.layer import put_dense_layers
from .base_record import keeps_attributes
from .engines import is_sharded, whole_parameters, whole_shape
from .layer import AdaptedLayer
from .quantized import unload_dequantized


class MergingModel(BaseTuner):
    """How a model merges its adapters."""

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        untie_adapted_weights(self.model)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        for layer in self._adapted_layers():
            layer.check_merge_stays()
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(  # type: ignore[override]
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            for layer in self._adapted_layers():
                layer.check_unload_stays()
            self._check_merge(adapter_names, safe_merge)
        else:
            self._check_bases()
        identities = self._ids_once_unloaded(adapter_names if merge else [])
        unloaded: nn.Module = super()._unload_and_optionally_merge(  # type: ignore[assignment]
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )
        mark_merged(unloaded, identities)
        return unloaded

    def _ids_once_unloaded(self, adapter_names: list[str] | None) -> list[str]:
        """The ids of the adapters that the weights contain once these are merged: those merged before stay in them."""
        before = [name for layer in self._adapted_layers() for name in layer.merged_adapters]
        names = self.active_adapters if adapter_names is None else adapter_names
        return merged_ids(self.model, list(dict.fromkeys([*before, *names])))

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        dequantize: bool = False,
    ) -> nn.Module:
        """
        This method merges the adapter layers into the base model and returns it without them.

        Args:
            progressbar (`bool`):
                whether to show a progressbar indicating the unload and merge process (default: False).
            safe_merge (`bool`):
                whether to activate the safe merging check to check if there is any potential Nan in the adapter
                weights.
            adapter_names (`List[str]`, *optional*):
                The list of adapter names that should be merged. If None, all active adapters will be merged. Defaults
                to `None`.
            dequantize (`bool`):
                whether to return a model whose quantized layers, adapted or not, are plain linear layers in the dtype
                of the model's other parameters. The merged weights are not rounded to the quantized format then. By
                default they are quantized again as the base model is.

        Returns:
            `torch.nn.Module`: The base model.

        Raises:
            ValueError: If a merged weight is not finite and `safe_merge` is set or it is to be quantized, or if
                quantizing would lose a zero. The model is as it was before.
        """
        identities = self._ids_once_unloaded(adapter_names) if dequantize else []
        before = merged_adapters(vars(self.model.config)) if identities else []
        if dequantize:
            self._check_merge(adapter_names, safe_merge, quantized=False)
            self._check_merge_allowed()
            unload_dequantized(self.model, adapter_names, safe_merge)
        merged: nn.Module = super().merge_and_unload(
            progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )
        if dequantize:
            put_dense_layers(merged)  # the experts, which are merged in the form that they have
        if identities:
            # in the place of the ids of the layers that were left
            setattr(merged.config, MERGED, [*before, *identities])
        return merged

    def _adapted_layers(self) -> list[AdaptedLayer]:
        return [module for module in self.model.modules() if isinstance(module, AdaptedLayer)]

    def _check_bases(self) -> None:
        """Refuse layers around those of another method: PEFT would take both away, or unmerge both in one order."""
        for layer in self._adapted_layers():
            inner = layer.base_layer
            if isinstance(inner, BaseTunerLayer) and not isinstance(inner, AdaptedLayer):
                raise ValueError(
                    f"module {layer.module_name!r} has another adapter under the SPP adapter, a layer of "
                    f"{type(inner).__module__}: merge that one into the base model before SPP is added, so that the "
                    "SPP adapter can be merged or unloaded"
                )

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool, quantized: bool = True) -> None:
        """Check all layers before the first one is merged, so that a broken adapter leaves no half-merged model."""
        self._check_bases()
        names = self.active_adapters if adapter_names is None else adapter_names
        if unknown := [name for name in names if name not in self.peft_config]:
            raise ValueError(f"Adapter {unknown[0]!r} not found, available adapters: {list(self.peft_config)}")
        layers = self._adapted_layers()
        for layer in layers:
            layer.follow_base_layer()
            if any(name in layer.spp_A for name in names):
                layer.check_writable()
                layer.get_factors(names)
        for layer in layers:
            # a weight may not survive quantizing, safe merge or not
            if safe_merge if layer.backend.is_lossless else quantized:
                layer.check_merge(adapter_names)


def untie_adapted_weights(model: nn.Module) -> None:
    """
    Give adapted layers that share their weight with another module their own weight.

    A merge writes W' where W was. Other users of W, and other adapters on it, must not see that.
    """
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    for module in model.modules():
        if not isinstance(module, AdaptedLayer) or not module.backend.is_lossless:
            continue  # a merge gives a layer that quantizes a new weight
        base_layer, name = module.get_base_layer(), module.parameter_name
        weight = getattr(base_layer, name)
        if users.get(id(weight), 0) > 1:
            users[id(weight)] -= 1
            with torch.inference_mode(False):  # the layer may be trained again
                copy = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
            setattr(base_layer, name, copy)
            warnings.warn(
                f"The weight of {module.module_name!r} is shared with another module. The adapter is merged into a "
                "separate copy of it.",
                stacklevel=2,
            )


def merged_ids(model: nn.Module, adapter_names: list[str]) -> list[str]:
    """The ids of adapters of a model, for [`mark_merged`] once they are merged."""
    if not keeps_attributes(model):
        return []
    return [identity for name in adapter_names if (identity := _identity(model, name)) is not None]


def _identity(model: nn.Module, adapter_name: str) -> str | None:
    # the names that factors are saved under: the wrappers of several parameters of a module are nested
    layers = {
        name: one for name, one in model.named_modules() if isinstance(one, AdaptedLayer) and adapter_name in one.spp_A
    }
    if not layers or not all(_is_whole(layer, adapter_name) for layer in layers.values()):
        return None
    return adapter_id(_factors(layers, adapter_name))


def _is_whole(layer: AdaptedLayer, adapter_name: str) -> bool:
    parameters = [one for part in _parts(layer, adapter_name) for one in part.parameters()]
    return all(math.prod(whole_shape(one)) and (is_sharded(one) or not one.is_meta) for one in parameters)


def _factors(layers: Mapping[str, AdaptedLayer], adapter_name: str) -> Iterator[Factor]:
    for name, layer in layers.items():
        part_A, part_B = _parts(layer, adapter_name)
        with whole_parameters(part_A), whole_parameters(part_B):
            A, B = cast(Tensor, part_A.weight), cast(Tensor, part_B.weight)
            yield name, _scaling_in_files(layer, adapter_name, A.shape[0]), A, B


def _scaling_in_files(layer: AdaptedLayer, adapter_name: str, rows: int) -> float:
    """alpha by the rows of A, which is all that a file tells: those of all experts."""
    scaling, r = float(layer.scaling[adapter_name]), layer.r[adapter_name]
    # dividing and multiplying may have changed the last digit of alpha
    return scaling if rows == r else float(f"{scaling * r:.15g}") / rows


def _parts(layer: AdaptedLayer, adapter_name: str) -> tuple[nn.Module, nn.Module]:
    return layer.spp_A[adapter_name], layer.spp_B[adapter_name]


def mark_merged(model: nn.Module, identities: list[str]) -> None:
    """List adapters in the configuration of a model that they were merged into; `save_pretrained` writes it."""
    if identities:
        setattr(model.config, MERGED, [*merged_adapters(vars(model.config)), *identities])
