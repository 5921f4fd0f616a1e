# SPDX-License-Identifier: Apache-2.0
"""Replacing the weights of a loaded adapter in place. `peft.utils.hotswap` does this for LoRA and refuses all else."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, Literal, cast

import torch
from peft import PeftConfig, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from torch import nn

from .functional.factors import compute_dtype
from .functional.row_blocks import refine_row_blocks
from .tuner import SPPConfig, SPPLayer
from .tuner.adapter_files import PREFIX
from .tuner.adapter_tensors import has_place, saved_name
from .tuner.base_record import check_base
from .tuner.loading import check_tokens, read_if_ours
from .tuner.module_names import own_modules
from .tuner.settings import check_choice, check_rank


# how many keys a message names
_SHOWN = 3


def hotswap_adapter(
    model: nn.Module, model_name_or_path: str, adapter_name: str, torch_device: str | None = None, **kwargs: Any
) -> None:
    """
    Replace a loaded SPP adapter's weights with those of a saved one, as `peft.utils.hotswap.hotswap_adapter` does.

    The parameters stay the same tensors in the same memory, so a compiled model is not compiled again (unless the
    scaling differs, see [`prepare_model_for_compiled_hotswap`]) and an optimizer goes on with them. The settings
    that the new weights need, that is the scalings and what the adapter remembers of its base model, are taken over.

    The new adapter may have fewer row blocks, if each of them is made up of whole blocks of the loaded one, as with an
    `r` of 4 in the place of 16 where 16 divides the output rows: it is written with the blocks of the loaded one,
    which changes nothing that it computes. Layers that the new adapter does not adapt become those of the base model.
    An adapter with other row blocks, or for layers that the loaded one does not have, is refused before anything is
    changed.

    Args:
        model ([`PeftModel`]): The model with the loaded adapter. It may be compiled.
        model_name_or_path (`str`): The new adapter: a folder or the id of a repository on the Hub.
        adapter_name (`str`): The name of the adapter to replace, e.g. `"default"`. It keeps its name.
        torch_device (`str`, *optional*, defaults to None): The device to load the new adapter onto.
        **kwargs (`optional`): Additional keyword arguments used for loading the configuration and the weights.

    Raises:
        ValueError: If one of the two is not an SPP adapter, the loaded one is merged, they have different dropout, or
            the new one is broken.
        RuntimeError: If the new adapter does not fit.
    """
    saved = read_if_ours(model_name_or_path, kwargs)
    if saved is None:
        hub_kwargs = {name: kwargs.get(name) for name in ("subfolder", "revision", "cache_dir", "token")}
        peft_type = PeftConfig._get_peft_type(model_name_or_path, **hub_kwargs)
        raise ValueError(f"Incompatible PEFT types found: SPP and {peft_type} of {model_name_or_path}.")
    saved.config.set_check_base(kwargs)
    hub, _, _ = PeftConfig._split_kwargs(kwargs)
    state_dict = load_peft_weights(model_name_or_path, device=torch_device, **hub)
    hotswap_adapter_from_state_dict(model, state_dict, adapter_name, saved.config)


@torch.no_grad()
def hotswap_adapter_from_state_dict(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor], adapter_name: str, config: SPPConfig
) -> None:
    """
    Replace the weights of a loaded SPP adapter with those of a state dict. See [`hotswap_adapter`].

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
    layers = _layers(model, adapter_name)
    loaded = _check_configs(model, layers.values(), adapter_name, config)
    current = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    if not any(key.startswith(PREFIX) for key in current):
        # a Transformers model has its adapters without a PeftModel around it
        state_dict = {key.removeprefix(PREFIX): tensor for key, tensor in state_dict.items()}
    factors = {name: state_dict.get(f"{name}.spp_A.weight") for name in layers}
    # PEFT saves the base model's weight of an adapted head next to its factors; it is there already
    state_dict = {
        key: one
        for key, one in state_dict.items()
        if key.removesuffix(".base_layer.weight") not in layers or not has_place(saved_name(key), model, adapter_name)
    }
    refined = {
        f"{name}.spp_A.weight": _refine(A, layers[name], adapter_name) for name, A in factors.items() if A is not None
    }
    new = _check_tensors(current, {**state_dict, **refined})
    if config.base_record is None or config.base_record != loaded.base_record:
        check_base(config, model, adapter_name)
    loaded.record_of_weights = None

    set_peft_model_state_dict(model, new, adapter_name=adapter_name)
    ranks = {
        name: layer.r[adapter_name] if (A := factors[name]) is None else A.shape[0] // layer.num_experts
        for name, layer in layers.items()
    }
    for name, layer in layers.items():
        key = get_pattern_key(list(config.alpha_pattern), layer.module_name)
        alpha, r, own_r = config.alpha_pattern.get(key, config.spp_alpha), ranks[name], layer.r[adapter_name]
        layer.spp_alpha[adapter_name] = alpha if r == own_r else alpha * own_r / r
        layer.set_scaling(adapter_name, alpha / r)
    # so that the adapter, saved again, is the new one; its ranks and targets are still those of the loaded one
    loaded.spp_alpha, loaded.alpha_pattern = config.spp_alpha, dict(config.alpha_pattern)
    if any(layer.r[adapter_name] != ranks[name] for name, layer in layers.items()):
        _describe_alphas(loaded, layers.values(), adapter_name)
    loaded.base_record = config.base_record


@torch.no_grad()
def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: SPPConfig | Mapping[str, SPPConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """
    Prepare a model such that hot-swapping its adapter does not compile it again, as
    `peft.utils.hotswap.prepare_model_for_compiled_hotswap` does.

    It is needed if the adapters have different scalings or different numbers of row blocks. Call it when the first
    adapter has been loaded, and before the model is compiled or an optimizer is made for it. The scalings become
    tensors; and with a `target_rank` the adapter is written with more row blocks, which changes nothing that it
    computes. (Trained further, it has the freedom of all these blocks.)

    An SPP adapter is not a special case of every one with more row blocks: its blocks have to be made up of whole
    blocks of the other one. The safe choice for `target_rank` is a common multiple of the `r` of all adapters that
    divides the output rows of all layers; `r` of 4, 8 and 16 go together with 16. Whatever does not fit is refused.

    Args:
        model (`nn.Module`): The model with the loaded adapter, before compilation.
        target_rank (`int`, *optional*):
            The number of row blocks that the adapters get; in layers with fewer output rows one block a row. If not
            specified, the row blocks are unchanged.
        config (`SPPConfig` or `dict[str, SPPConfig]`, *optional*):
            The configurations of the model's adapters. They are updated also if they are not passed, so that a saved
            adapter can be loaded.
        check_compiled (`str`, *optional*, defaults to `"error"`):
            What to do if the model is compiled already: `"error"`, `"warn"` or `"ignore"`.

    Raises:
        ValueError: If the model is compiled, has no SPP layers, or an adapter cannot have these row blocks. Nothing is
            changed then.

    Example:

    ```py
    model = PeftModel.from_pretrained(base_model, "adapter-0")
    prepare_model_for_compiled_hotswap(model, target_rank=16)
    model = torch.compile(model)
    # ... inference with adapter 0 ...
    hotswap_adapter(model, "adapter-1", adapter_name="default")
    ```
    """
    check_choice("check_compiled", check_compiled, ("error", "warn", "ignore"))
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None):
        message = "Call prepare_model_for_compiled_hotswap *before* compiling the model"
        if check_compiled == "error":
            raise ValueError(f"{message}.")
        if check_compiled == "warn":
            warnings.warn(f"{message}; it will be compiled again.", stacklevel=2)
    model = getattr(model, "_orig_mod", model)
    own = {name: one for name, one in getattr(model, "peft_config", {}).items() if isinstance(one, SPPConfig)}
    layers = {name: _layers(model, name).values() for name in own}
    if not any(layers.values()):
        raise ValueError("No SPP layers found: call prepare_model_for_compiled_hotswap after loading an adapter.")
    passed = config.values() if isinstance(config, Mapping) else [config] if config is not None else []
    if any(all(one is not theirs for theirs in own.values()) for one in passed):
        raise ValueError(
            "`config` does not belong to an adapter of the model. Pass `model.peft_config`, or leave it out."
        )
    refined = []
    if target_rank is not None:
        check_rank("target_rank", target_rank)
        refined = [_pad(layer, name, target_rank) for name in own for layer in layers[name]]

    for layer, adapter_name, A in refined:
        r = A.shape[0] // layer.num_experts
        layer.spp_alpha[adapter_name] *= r / layer.r[adapter_name]
        layer.r[adapter_name] = r
        factor = cast(nn.Linear, layer.spp_A[adapter_name])
        factor.weight = nn.Parameter(A, requires_grad=factor.weight.requires_grad)
        factor.out_features = A.shape[0]
    for adapter_name, one in own.items():
        for layer in layers[adapter_name]:
            if not isinstance(scaling := layer.scaling[adapter_name], torch.Tensor):
                A, B, _ = layer.get_factors([adapter_name])[0]
                layer.scaling[adapter_name] = torch.tensor(scaling, device=B.device, dtype=compute_dtype(A, B))
        if target_rank is not None and layers[adapter_name]:
            one.r, one.rank_pattern = target_rank, dict.fromkeys(one.rank_pattern, target_rank)
            _describe_alphas(one, layers[adapter_name], adapter_name)


def _layers(model: nn.Module, adapter_name: str) -> dict[str, SPPLayer]:
    return {
        name: module
        for name, module in own_modules(model)
        if isinstance(module, SPPLayer) and adapter_name in module.spp_A
    }


def _pad(layer: SPPLayer, adapter_name: str, target_rank: int) -> tuple[SPPLayer, str, torch.Tensor]:
    """A of an adapter with the row blocks that are asked for."""
    r, target = layer.r[adapter_name], min(target_rank, layer.out_features)
    try:
        if r > target:
            raise ValueError(f"the original rank is larger ({r})")
        A = layer.get_factors([adapter_name])[0].A
        return layer, adapter_name, refine_row_blocks(A, layer.out_features, target, layer.num_experts)
    except ValueError as error:
        raise ValueError(
            f"Trying to pad the adapter {adapter_name!r} to the target rank {target_rank}, which is not possible in "
            f"{layer.module_name!r}: {error}."
        ) from error


def _refine(A: torch.Tensor, layer: SPPLayer, adapter_name: str) -> torch.Tensor:
    """A new A with the row blocks of the loaded one, if it is a factor for this layer at all."""
    if A.ndim != 2 or A.shape[1] != layer.in_features or A.shape[0] % layer.num_experts:
        return A
    r, own_r = layer.r[adapter_name], A.shape[0] // layer.num_experts
    if not 0 < own_r < r:
        return A
    try:
        return refine_row_blocks(A, layer.out_features, r, layer.num_experts)
    except ValueError as error:
        raise RuntimeError(
            f"Hot swapping the adapter did not succeed: spp_A of {layer.module_name!r} has {own_r} row blocks in the "
            f"new adapter and {r} in the loaded one, and {error}. Load an adapter with a different `r` first, or "
            "call `prepare_model_for_compiled_hotswap` with a `target_rank` that fits both."
        ) from error


def _describe_alphas(config: SPPConfig, layers: Collection[SPPLayer], adapter_name: str) -> None:
    """Write the alphas of the layers into the configuration: the most frequent one, and a pattern for the others."""
    alphas = {layer.module_name: layer.spp_alpha[adapter_name] for layer in layers}
    config.spp_alpha = Counter(alphas.values()).most_common(1)[0][0]
    config.alpha_pattern = {
        f"^{re.escape(name)}": alpha for name, alpha in alphas.items() if alpha != config.spp_alpha
    }


def _check_configs(model: nn.Module, layers: Collection[SPPLayer], adapter_name: str, config: SPPConfig) -> SPPConfig:
    """Check that the loaded adapter can be replaced by one of this configuration, and return its own."""
    configs = getattr(model, "peft_config", {})
    loaded = configs.get(adapter_name)
    if not isinstance(loaded, SPPConfig) or not isinstance(config, SPPConfig):
        raise ValueError(
            f"Only an SPP adapter can be swapped for an SPP adapter: {adapter_name!r} is "
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
            f"Configs are incompatible: for spp_dropout, {loaded.spp_dropout} != {config.spp_dropout}. Change "
            "`spp_dropout` in the new configuration, or load the new adapter as a separate one."
        )
    check_tokens("The new adapter", config, loaded, adapter_name)
    return loaded


def _check_tensors(
    current: Mapping[str, torch.Tensor], state_dict: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Check that the new tensors fit those of the loaded adapter, and fill up what the new adapter does not adapt."""
    unexpected = sorted(set(state_dict) - set(current))
    if unexpected:
        raise RuntimeError(
            f"Hot swapping the adapter did not succeed, unexpected keys found: {', '.join(unexpected[:_SHOWN])} "
            f"({len(unexpected)} in all). The new adapter has tensors that the loaded one does not have: load it as "
            "a separate adapter."
        )
    missing = set(current) - set(state_dict)
    halves = sorted(key for key in missing if not _is_whole_layer(key, missing))
    if halves:
        raise RuntimeError(
            f"Hot swapping the adapter did not succeed, missing keys: {', '.join(halves[:_SHOWN])} ({len(halves)} in "
            "all). The new adapter was saved without tensors that the loaded one trained."
        )
    for key, tensor in state_dict.items():
        if tensor.shape != current[key].shape:
            raise RuntimeError(
                f"Hot swapping the adapter did not succeed: {key} is {tuple(tensor.shape)} in the new adapter and "
                f"{tuple(current[key].shape)} in the loaded one. Load the one with the larger `r` first, or call "
                "`prepare_model_for_compiled_hotswap` with a `target_rank` that fits both."
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"The new adapter is broken: {key} contains NaN or infinite values.")
    zeros = {key: torch.zeros_like(current[key]) for key in missing if key.endswith(".spp_B.weight")}
    if zeros:
        warnings.warn(
            f"The new adapter does not cover {len(zeros)} of the loaded adapter's layers; they go back to the base "
            "model's weights.",
            stacklevel=3,
        )
    return {**current, **state_dict, **zeros}


def _is_whole_layer(key: str, missing: set[str]) -> bool:
    """Whether a key is that of a factor whose other factor is missing as well."""
    other = key.replace(".spp_A.", ".spp_B.") if ".spp_A." in key else key.replace(".spp_B.", ".spp_A.")
    return other != key and other in missing
