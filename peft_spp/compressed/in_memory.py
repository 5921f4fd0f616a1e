# SPDX-License-Identifier: Apache-2.0
"""Compressing a model that is loaded already, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..functional.bitmask import count_stored
from ..functional.compressed import compress as compress_weight
from .config import BitmaskConfig
from .expert_converters import ExpertConverters
from .experts import put_stack
from .layer import CompressedLinear, put_dense_layers
from .other_adapters import allow_merges, is_spp
from .quantizer import BitmaskHfQuantizer
from .saving import saving_transforms
from .selection import (
    converted_names,
    find_compressible,
    module_name,
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
    Stop storing the zeros of a model's linear layers, and of the experts of a mixture.

    The layers become [`CompressedLinear`], and modules with stacks of experts get another class; they compute the same
    and are frozen. A warning names layers and experts with too few zeros, which stay dense. A model of Transformers is
    then saved compressed.

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
    layers, stacks, kept = find_compressible(module, modules_to_not_convert)
    for name in stored_in_another_form(models, layers, stacks):
        layers.pop(name, None)
        stacks.pop(name, None)
        kept[module_name(name)] = "stored in another form"
    for name, layer in layers.items():
        _check_whole(name, layer.weight, (layer.out_features, layer.in_features))
    for name, (owner, parameter) in stacks.items():
        _check_whole(name, owner._parameters[parameter])
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
    for name, (owner, parameter) in stacks.items():
        weight = owner._parameters[parameter]
        assert weight is not None
        reason = why_not_worth_it(count_stored(weight), weight.shape, weight.dtype, min_sparsity)
        if reason is not None:
            kept[module_name(name)] = reason
        else:
            put_stack(owner, parameter, compress_weight(weight))
    warn_of_dense_layers(kept)
    for prefix, model in models.items():
        start = f"{prefix}." if prefix else ""
        names = [name.removeprefix(start) for name in kept if name.startswith(start)]
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


def _check_whole(name: str, weight: Any, shape: tuple[int, ...] | None = None) -> None:
    if weight.is_meta:
        raise ValueError(f"{name} has no data (it is on the meta device): load the model into memory first")
    if weight.shape != (shape or weight.shape):
        raise ValueError(f"{name} is {_NOT_WHOLE.format(f'has shape {tuple(weight.shape)}')}")


def stored_in_another_form(
    models: Mapping[str, PreTrainedModel], layers: Iterable[str], stacks: Mapping[str, tuple[nn.Module, str]]
) -> set[str]:
    """Those of the layers and stacks that Transformers stores in a form that has no place for a bitmask."""
    found = set()
    for prefix, model in models.items():
        start = f"{prefix}." if prefix else ""
        transforms = saving_transforms(model)
        inside = [f"{name.removeprefix(start)}.weight" for name in layers if name.startswith(start)]
        found |= {start + module_name(name) for name in converted_names(inside, transforms)}
        experts = ExpertConverters(model, transforms)
        shapes = {name: owner.get_parameter(parameter).shape for name, (owner, parameter) in stacks.items()}
        own = {name: shape for name, shape in shapes.items() if name.startswith(start)}
        found |= {name for name, shape in own.items() if not experts.can_compress(name.removeprefix(start), shape)}
    return found


def _mark(model: PreTrainedModel, config: BitmaskConfig) -> None:
    """Make Transformers save and treat a model as one that was loaded with compressed weights."""
    quantizer = BitmaskHfQuantizer(config)
    # what from_pretrained sets
    attributes = {"hf_quantizer": quantizer, "is_quantized": True, "quantization_method": config.quant_method}
    for name, value in attributes.items():
        setattr(model, name, value)
    quantizer.postprocess_model(model)
