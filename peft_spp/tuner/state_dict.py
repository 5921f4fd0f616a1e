# SPDX-License-Identifier: Apache-2.0
"""The tensors of an adapter among those of a model: under which names they are saved and loaded."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..checkpoints.names import unwrapped_name
from ..sparsity.base_masks import warn_or_raise
from .adapter_tensors import BY_ADAPTER, belongs_to, head_modules, other_adapters, restore_tensors
from .config import SPPConfig
from .layer import AdaptedLayer
from .layer_factors import SPPLayer
from .loading import check_loaded, refuse_misfits
from .module_names import ModuleNames, own_modules


def _loaded_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What a file of an adapter can hold: its own tensors, and embeddings and heads that PEFT saves with it."""
    for owner, module in model.named_modules(remove_duplicate=False):
        for name, tensor in chain(module._parameters.items(), module._buffers.items()):
            key = f"{owner}.{name}"
            if tensor is not None and (type(module) in (nn.Embedding, nn.Linear) or BY_ADAPTER & set(key.split("."))):
                yield key, tensor


def _unmerge_heads(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> None:
    """Put W in the place of W': of an adapted head PEFT saves what its base layer holds, merged or not."""
    merged = {
        _weight(one).data_ptr(): one
        for one in head_modules(model)
        if isinstance(one, AdaptedLayer) and one.merged and _is_plain(one)
    }
    for key, tensor in state_dict.items():
        if key.endswith(".base_layer.weight") and (layer := merged.get(tensor.data_ptr())) is not None:
            state_dict[key] = layer.backend.stored(layer.unmerged_weight()).detach().clone()


def _keep_rows(layer: AdaptedLayer, state_dict: dict[str, torch.Tensor], key: str, config: SPPConfig) -> None:
    """
    Load of an adapted head's base weight, which PEFT saves, only the rows that the model does not have.

    Where the vocabulary was resized these are the new tokens'. The other rows may have been pruned further since.
    """
    saved, own = state_dict[key], _weight(layer).detach()
    if layer.merged:
        del state_dict[key]
    elif _is_plain(layer) and own.shape == saved.shape and not saved.is_meta:
        saved = saved.to(own.device, own.dtype)
        is_there = (own != 0).any(-1, keepdim=True)
        state_dict[key] = torch.where(is_there & ((own == 0) | (own == saved)).all(-1, keepdim=True), own, saved)
        lost = int((is_there & (own == 0) & (state_dict[key] != 0)).sum())
        if lost and config.check_base != "off":
            warn_or_raise(
                f"The adapter brings a weight of {layer.module_name!r} with it, as PEFT saves it with "
                f"save_embedding_layers, that is not this base model's: {lost} of its zeros are not zero there. Load "
                f"the base model that it was trained on ({config.base_model_name_or_path}).",
                config.check_base,
            )


def _give_dtypes(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> None:
    """Convert what replaces parameters without memory (`low_cpu_mem_usage`), as copying into others does."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.is_meta and name in state_dict:
            state_dict[name] = state_dict[name].to(parameter.dtype)


def _weight(layer: AdaptedLayer) -> torch.Tensor:
    return cast(torch.Tensor, layer.get_base_layer().weight)


def _is_plain(layer: AdaptedLayer) -> bool:
    """Whether a layer's weight is a matrix of numbers, a row for each output, all of it here."""
    weight = getattr(layer.get_base_layer(), "weight", None)
    if not isinstance(weight, nn.Parameter):
        return False
    is_tensor = type(weight.data) is torch.Tensor and not weight.is_meta
    return is_tensor and not layer.fan_in_fan_out and tuple(weight.shape) == (layer.out_features, layer.in_features)


class AdapterStateDict(BaseTuner):
    """How PEFT selects, names and loads the tensors of an adapter."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # This runs before the factors' own, so nothing is loaded yet where shapes do not fit.
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        own = {f"{prefix}{name}": tuple(tensor.shape) for name, tensor in _loaded_tensors(self)}
        refuse_misfits({key: tuple(state_dict[key].shape) for key in own if key in state_dict}, own)

    @classmethod
    def _get_adapter_state_dict(  # type: ignore[override]
        cls, model: nn.Module, state_dict: dict[str, torch.Tensor], **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        adapter_name = kwargs["adapter_name"]
        restore_tensors(model, adapter_name, state_dict)
        _unmerge_heads(model, state_dict)
        names = ModuleNames(model)
        keys = {names.peft_key(key): key for key in state_dict}
        selected = super()._get_adapter_state_dict(
            model=model, state_dict={name: state_dict[key] for name, key in keys.items()}, **kwargs
        )
        # PEFT reads `modules_to_save` and the like out of the same dictionary afterward
        state_dict.update({name: state_dict[key] for name, key in keys.items() if name != key})
        others = other_adapters(model, adapter_name)
        selected = {key: tensor for key, tensor in selected.items() if not any(belongs_to(key, one) for one in others)}
        return {names.plain(key): tensor for key, tensor in selected.items()}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        without: str = super()._remove_adapter_name_from_key(unwrapped_name(key), adapter_name)
        return without

    @classmethod
    def _remap_adapter_state_dict_for_load(  # type: ignore[override]
        cls, model: nn.Module, config: SPPConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        keys = ModuleNames(model).keys_of(model.state_dict())
        for name, module in own_modules(model):
            if isinstance(module, SPPLayer) and adapter_name in module.spp_A:
                for factor in module.adapter_layer_names:
                    key = keys[f"{name}.{factor}.{adapter_name}.weight"]
                    keys[f"{name}.{factor}.weight"] = key
        # a model that has its adapters without a `PeftModel` around it does not have the prefix of the saved names
        remapped = {
            keys.get(name) or keys.get(name.removeprefix("base_model.model."), name): tensor
            for name, tensor in ((unwrapped_name(key), tensor) for key, tensor in state_dict.items())
        }
        check_loaded(model, config, adapter_name, remapped)
        for name, module in own_modules(model):
            base_key = keys.get(f"{name}.base_layer.weight", "")
            if isinstance(module, AdaptedLayer) and adapter_name in module.spp_A and base_key in remapped:
                _keep_rows(module, remapped, base_key, config)
        _give_dtypes(model, remapped)
        return remapped
