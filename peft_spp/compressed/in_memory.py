# SPDX-License-Identifier: Apache-2.0
"""Compressing a model that is loaded already, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from ..functional.bitmask import count_stored
from .config import BitmaskConfig
from .layer import CompressedLinear, put_dense_layers
from .other_adapters import allow_merges, is_spp
from .quantizer import BitmaskHfQuantizer
from .selection import (
    converted_names,
    find_linear_layers,
    names_of_layers,
    transformers_models,
    warn_of_dense_layers,
    why_not_worth_it,
)


M = TypeVar("M", bound=nn.Module)

_NOT_WHOLE = (
    "not whole in memory: its weight {}. Compress the model before it is sharded. Tensor parallelism and DeepSpeed "
    "ZeRO-3 cannot shard compressed weights; FSDP2, ZeRO-2 and DDP train them"
)


def compress(
    module: M, *, modules_to_not_convert: Sequence[str] | None = None, min_sparsity: float | None = None
) -> M | CompressedLinear:
    """
    Stop storing the zeros of a model's linear layers.

    The layers become [`CompressedLinear`], which compute the same and are frozen; a warning names those that have too
    few zeros. A model of Transformers is saved compressed afterwards.

    Args:
        module (`nn.Module`): Any module, changed in place.
        modules_to_not_convert (`Sequence[str]`, *optional*): See [`BitmaskConfig`].
        min_sparsity (`float`, *optional*): See [`BitmaskConfig`].

    Returns:
        `nn.Module`: The module, or its replacement if it is a linear layer itself.

    Raises:
        ValueError: If the model has adapters, is quantized in another way, or has parameters without data. Nothing is
            changed.
    """
    BitmaskConfig(modules_to_not_convert, min_sparsity)  # which checks them
    models = transformers_models(module)
    _check(module, models)
    layers, kept = find_linear_layers(module, modules_to_not_convert)
    for name in _stored_in_another_form(models, list(layers)):
        del layers[name]
        kept[name] = "stored in another form"
    for name, layer in layers.items():
        if layer.weight.is_meta:
            raise ValueError(f"{name} has no data (it is on the meta device): load the model into memory first")
        if layer.weight.shape != (layer.out_features, layer.in_features):
            raise ValueError(f"{name} is {_NOT_WHOLE.format(f'has shape {tuple(layer.weight.shape)}')}")
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and isinstance(layer._parameters.get("weight"), DTensor):
            raise ValueError(f"{name} is {_NOT_WHOLE.format('is a DTensor')}")
    for name in list(layers):
        layer = layers.pop(name)  # and so its memory is free once it is replaced
        reason = why_not_worth_it(count_stored(layer.weight), layer.weight.shape, layer.weight.dtype, min_sparsity)
        if reason is not None:
            kept[name] = reason
        elif layer is module:
            return CompressedLinear.from_linear(layer)
        else:
            module.set_submodule(name, CompressedLinear.from_linear(layer))
    warn_of_dense_layers(kept)
    for prefix, model in models.items():
        start = f"{prefix}." if prefix else ""
        names = [name.removeprefix(start) for name in names_of_layers(kept) if name.startswith(start)]
        its_own = BitmaskConfig(names, min_sparsity)
        _mark(model, its_own)
    return module


def decompress(module: M) -> M | nn.Linear:
    """
    Make the weights of a model dense again, bit for bit. Adapters of methods other than SPP stay in place.

    Args:
        module (`nn.Module`): Any module, changed in place.

    Returns:
        `nn.Module`: The module, or its replacement if it is a [`CompressedLinear`] itself.

    Raises:
        ValueError: If the model has SPP adapters, or is quantized in another way. Nothing is changed.
    """
    models = transformers_models(module)
    _check(module, models, is_spp)
    if isinstance(module, CompressedLinear):
        return module.to_linear()
    put_dense_layers(module)
    allow_merges(module)
    for model in models.values():
        quantizer = getattr(model, "hf_quantizer", None)
        if quantizer is not None:
            quantizer.remove_quantization_config(model)
    return module


def _check(
    module: nn.Module,
    models: Mapping[str, PreTrainedModel],
    is_in_the_way: Callable[[BaseTunerLayer], bool] = lambda layer: True,
) -> None:
    for name, inner in module.named_modules():
        if isinstance(inner, BaseTunerLayer) and is_in_the_way(inner):
            raise ValueError(
                f"{name} has an adapter, which is made for the weight that is there: compress or decompress the model "
                "before adapters are added, or after merge_and_unload()"
            )
    for model in models.values():
        quantizer = getattr(model, "hf_quantizer", None)
        if quantizer is not None and not isinstance(quantizer, BitmaskHfQuantizer):
            method = quantizer.quantization_config.quant_method
            raise ValueError(f"the model is quantized with {getattr(method, 'value', method)}: load it without")


def _stored_in_another_form(models: Mapping[str, PreTrainedModel], names: Sequence[str]) -> set[str]:
    found = set()
    for prefix, model in models.items():
        start = f"{prefix}." if prefix else ""
        transforms = getattr(model, "_weight_conversions", None)
        if transforms is None:
            transforms = get_model_conversion_mapping(model, add_legacy=False)
        inside = [f"{name.removeprefix(start)}.weight" for name in names if name.startswith(start)]
        found |= {start + name.removesuffix(".weight") for name in converted_names(inside, transforms)}
    return found


def _mark(model: PreTrainedModel, config: BitmaskConfig) -> None:
    """Make Transformers save and treat a model as one that was loaded with compressed weights."""
    quantizer = BitmaskHfQuantizer(config)
    # what from_pretrained sets
    attributes = {"hf_quantizer": quantizer, "is_quantized": True, "quantization_method": config.quant_method}
    for name, value in attributes.items():
        setattr(model, name, value)
    quantizer.postprocess_model(model)
