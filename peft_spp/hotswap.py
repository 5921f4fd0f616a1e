# SPDX-License-Identifier: Apache-2.0
"""Replacing the weights of a loaded adapter in place. `peft.utils.hotswap` does this for LoRA and refuses all else."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
from peft import PeftConfig, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.other import get_pattern_key
from torch import nn

from .tuner import SPPConfig, SPPLayer
from .tuner.base_record import check_base


_PREFIX = "base_model.model."
# how many keys a message names
_SHOWN = 3


def hotswap_adapter(
    model: nn.Module, model_name_or_path: str, adapter_name: str, torch_device: str | None = None, **kwargs: Any
) -> None:
    """
    Replace the weights of a loaded SPP adapter by those of a saved one, as `peft.utils.hotswap.hotswap_adapter` does.

    The parameters stay the same tensors in the same memory, so a compiled model is not compiled again (unless the
    scaling is another) and an optimizer goes on with them. The settings that the new weights need, that is the
    scalings and what the adapter remembers of its base model, are taken over.

    Layers that the new adapter does not adapt become those of the base model. An adapter for layers that the loaded
    one does not have, or with other shapes (another `r`), is refused before anything is changed.

    Args:
        model ([`PeftModel`]): The model with the loaded adapter. It may be compiled.
        model_name_or_path (`str`): The new adapter: a folder or the id of a repository on the Hub.
        adapter_name (`str`): The name of the adapter to replace, e.g. `"default"`. It keeps its name.
        torch_device (`str`, *optional*, defaults to None): The device to load the new adapter onto.
        **kwargs (`optional`): Additional keyword arguments used for loading the configuration and the weights.

    Raises:
        ValueError: If one of the two is no SPP adapter, the loaded one is merged, they have different dropout, or the
            new one is broken.
        RuntimeError: If the new adapter does not fit.
    """
    hub_kwargs = {name: kwargs.get(name) for name in ("subfolder", "revision", "cache_dir", "token")}
    peft_type = PeftConfig._get_peft_type(model_name_or_path, **hub_kwargs)
    if peft_type != "SPP":
        raise ValueError(f"Incompatible PEFT types found: SPP and {peft_type} of {model_name_or_path}.")
    config = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type].from_pretrained(model_name_or_path, **kwargs)
    weights_kwargs = {name: value for name, value in kwargs.items() if name != "check_base"}
    state_dict = load_peft_weights(model_name_or_path, device=torch_device, **weights_kwargs)
    hotswap_adapter_from_state_dict(model, state_dict, adapter_name, cast(SPPConfig, config))


@torch.no_grad()
def hotswap_adapter_from_state_dict(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor], adapter_name: str, config: SPPConfig
) -> None:
    """
    Replace the weights of a loaded SPP adapter by those of a state dict. See [`hotswap_adapter`].

    Args:
        model ([`PeftModel`] or a Transformers model with adapters): The model with the loaded adapter.
        state_dict (`Mapping[str, torch.Tensor]`):
            The new adapter, as it is saved and as [`~peft.get_peft_model_state_dict`] returns it.
        adapter_name (`str`): The name of the adapter to replace.
        config (`SPPConfig`): The configuration of the new adapter.

    Raises:
        ValueError: If there is no such SPP adapter, it is merged, has another dropout, or a new value is not finite.
        RuntimeError: If the new adapter does not fit.
    """
    model = getattr(model, "_orig_mod", model)
    layers = [module for module in model.modules() if isinstance(module, SPPLayer) and adapter_name in module.spp_A]
    loaded = _check_configs(model, layers, adapter_name, config)
    current = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    if not any(key.startswith(_PREFIX) for key in current):
        # a Transformers model has its adapters without a PeftModel around it
        state_dict = {key.removeprefix(_PREFIX): tensor for key, tensor in state_dict.items()}
    new = _check_tensors(current, state_dict)
    if config.base_record != loaded.base_record:
        check_base(config, model, adapter_name)

    set_peft_model_state_dict(model, new, adapter_name=adapter_name)
    for layer in layers:
        key = get_pattern_key(list(config.alpha_pattern), layer.module_name)
        layer.spp_alpha[adapter_name] = config.alpha_pattern.get(key, config.spp_alpha)
        scaling = layer.spp_alpha[adapter_name] / layer.r[adapter_name]
        if layer.scaling[adapter_name] != scaling:
            layer.scaling[adapter_name] = scaling
    # so that the adapter, saved again, is the new one; its ranks and targets are still those of the loaded one
    loaded.spp_alpha, loaded.alpha_pattern = config.spp_alpha, dict(config.alpha_pattern)
    loaded.base_record = config.base_record


def _check_configs(model: nn.Module, layers: list[SPPLayer], adapter_name: str, config: SPPConfig) -> SPPConfig:
    """Check that the loaded adapter can be replaced by one of this configuration, and return its own."""
    configs = getattr(model, "peft_config", {})
    loaded = configs.get(adapter_name)
    if not isinstance(loaded, SPPConfig) or not isinstance(config, SPPConfig):
        raise ValueError(
            f"An SPP adapter can only take the place of an SPP adapter: {adapter_name!r} is "
            f"{type(loaded).__name__ if loaded else 'not loaded'}, the new one is {type(config).__name__}. The model "
            f"has the adapters {sorted(configs)}."
        )
    if any(adapter_name in layer.merged_adapters for layer in layers):
        raise ValueError(
            f"Cannot hot-swap adapter {adapter_name!r} because it is merged into the base weights. Unmerge it first "
            "by calling `peft_model.unmerge_adapter()`."
        )
    if loaded.spp_dropout != config.spp_dropout:
        raise ValueError(
            f"Configs are incompatible: for spp_dropout, {loaded.spp_dropout} != {config.spp_dropout}. Set "
            "`spp_dropout` of the new configuration, or load the new adapter beside the old one."
        )
    return loaded


def _check_tensors(
    current: Mapping[str, torch.Tensor], state_dict: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Check that the new tensors fit those of the loaded adapter, and fill up what the new adapter does not adapt."""
    unexpected = sorted(set(state_dict) - set(current))
    if unexpected:
        raise RuntimeError(
            f"Hot swapping the adapter did not succeed, unexpected keys found: {', '.join(unexpected[:_SHOWN])} "
            f"({len(unexpected)} in all). The new adapter adapts what the loaded one does not: load it beside it."
        )
    missing = set(current) - set(state_dict)
    halves = sorted(key for key in missing if not _is_whole_layer(key, missing))
    if halves:
        raise RuntimeError(
            f"Hot swapping the adapter did not succeed, missing keys: {', '.join(halves[:_SHOWN])} ({len(halves)} in "
            "all). The new adapter was saved without what the loaded one has trained."
        )
    for key, tensor in state_dict.items():
        if tensor.shape != current[key].shape:
            raise RuntimeError(
                f"Hot swapping the adapter did not succeed: {key} is {tuple(tensor.shape)} in the new adapter and "
                f"{tuple(current[key].shape)} in the loaded one. Both need the same `r` in every layer."
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"The new adapter is broken: {key} has values that are NaN or infinite.")
    zeros = {key: torch.zeros_like(current[key]) for key in missing if key.endswith(".spp_B.weight")}
    if zeros:
        warnings.warn(
            f"The new adapter does not adapt {len(zeros)} of the layers of the loaded one; they become those of the "
            "base model.",
            stacklevel=3,
        )
    return {**current, **state_dict, **zeros}


def _is_whole_layer(key: str, missing: set[str]) -> bool:
    """Whether a key is that of a factor whose other factor is missing as well."""
    other = key.replace(".spp_A.", ".spp_B.") if ".spp_A." in key else key.replace(".spp_B.", ".spp_A.")
    return other != key and other in missing
