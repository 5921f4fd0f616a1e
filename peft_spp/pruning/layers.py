# SPDX-License-Identifier: Apache-2.0
"""Finding the linear layers of a model to prune, experts included, and pruning one of them."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..architecture import (
    FLOATING,
    LinearLayer,
    find_block_lists,
    is_linear_layer,
    linear_layers_in_blocks,
    what_computes,
    why_not_linear_map,
)
from ..checkpoints.names import as_names, is_fused_experts, matches, warn_of_names_without_layers
from ..compressed import CompressedLinear
from ..compressed.experts import find_compressed_stacks
from ..sparsity import NMPattern
from .experts import Expert, find_experts


PrunableLayer: TypeAlias = LinearLayer | Expert
"""A linear layer, or an expert of a mixture."""


def find_blocks(model: nn.Module, layers: Iterable[str] = ()) -> tuple[str, nn.ModuleList]:
    """
    Find the transformer blocks to prune.

    Of several stacks of blocks they are the one that all layers to prune are in, or else the one of the text model,
    which calibration text runs through, or else the one with the most weights of linear layers.

    It returns the name of the list in the model, and the list.
    """
    if _is_encoder_decoder(model):
        raise ValueError(
            "An encoder-decoder model has two stacks of blocks, which cannot be pruned block by block. Only magnitude "
            "pruning works for this model."
        )
    lists = find_block_lists(dict(model.named_modules()))
    if not lists:
        raise ValueError("The model has no transformer blocks: no nn.ModuleList in it holds linear layers.")
    layers = tuple(layers)
    named = [name for name in lists if layers and all(layer.startswith(f"{name}.") for layer in layers)]
    if named:
        return named[0], lists[named[0]]
    in_text_model = _modules_of_text_model(model)
    lists = {name: blocks for name, blocks in lists.items() if id(blocks) in in_text_model} or lists
    name = max(lists, key=lambda name: _linear_weights(lists[name]))
    return name, lists[name]


def find_target_layers(
    model: nn.Module, target_modules: str | Iterable[str] | None, exclude_modules: str | Iterable[str] | None = None
) -> dict[str, PrunableLayer]:
    """Find the linear layers to prune, and the experts. An expert goes by its own name and that of its stack."""
    _check_without_adapters(model)
    every = layers = prunable_layers(model)
    compressed = next((name for name, layer in layers.items() if isinstance(layer, CompressedLinear)), None)
    compressed = compressed or next(iter(find_compressed_stacks(model)), None)
    if compressed is not None:
        raise ValueError(f"{compressed} is compressed: call peft_spp.decompress(model) before pruning.")
    target_modules, exclude_modules = as_names(target_modules), as_names(exclude_modules)
    if target_modules is None:
        layers = {name: layers[name] for name in _default_targets(model)}
    else:
        layers = {name: layer for name, layer in layers.items() if _matches(name, layer, target_modules)}
    if not layers:
        raise ValueError(f"No linear layer of the model matches {target_modules=}.")
    warn_of_names_without_layers(
        lambda wanted: any(_matches(name, layer, wanted) for name, layer in every.items()),
        target_modules=target_modules,
        exclude_modules=exclude_modules,
    )
    if exclude_modules is not None:
        layers = {name: layer for name, layer in layers.items() if not _matches(name, layer, exclude_modules)}
        if not layers:
            raise ValueError(f"All linear layers that match {target_modules=} are excluded by {exclude_modules=}.")
    _check_not_embeddings(model, layers)
    return _linear_maps(layers, named=target_modules is not None)


def _check_without_adapters(model: nn.Module) -> None:
    """Raise a `ValueError` if there are adapters in the model: their factors are linear layers as well."""
    # of a body that is taken out of a model with adapters, the modules alone show it
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    adapted = next((name for name, module in model.named_modules() if isinstance(module, kinds)), None)
    if adapted is not None or hasattr(model, "peft_config"):
        where = f" ({adapted})" if adapted else ""
        raise ValueError(f"The model has a PEFT adapter{where}. Prune the base model before the adapter is added.")


def prunable_layers(model: nn.Module) -> dict[str, PrunableLayer]:
    """All linear layers of a model by their names, and all experts."""
    linear = {name: module for name, module in model.named_modules() if is_linear_layer(module)}
    return {**linear, **find_experts(model)}


def check_prunable(layers: Mapping[str, PrunableLayer], pattern: str | NMPattern | None) -> None:
    """Raise a `ValueError` that names the first layer which cannot be pruned (to `pattern`, where one is given)."""
    for name, layer in layers.items():
        computed = what_computes(*_holder(layer))
        if computed is not None:
            what, remedy = computed
            raise ValueError(
                f"The weight of {name} is computed from other tensors by {what}, so pruning it would not last. "
                f"{remedy}"
            )
        weight = getattr(layer, "weight", None)  # compressed-tensors has it packed under another name
        if weight is None or weight.dtype not in FLOATING:
            stored = "packed" if weight is None else f"stored as {weight.dtype}"
            raise ValueError(f"The weight of {name} is {stored}: prune before quantizing.")
        if weight.is_meta:
            raise ValueError(
                f"The weight of {name} has no data in memory (it is offloaded): load the model without offloading, or "
                "prune its folder with `peft-spp prune`."
            )
        if not layer.weight.isfinite().all():
            raise ValueError(f"The weight of {name} contains NaN or infinite values.")
    check_divisible(layers, pattern)


def check_divisible(layers: Mapping[str, PrunableLayer], pattern: str | NMPattern | None) -> None:
    """Raise a `ValueError` that names the first layer whose inputs are not a multiple of the M of `pattern`."""
    for name, layer in layers.items():
        in_features = weight_matrix(layer).shape[1]
        if pattern is not None and in_features % NMPattern.parse(pattern).m != 0:
            raise ValueError(
                f"The {in_features} input features of {name} are not divisible by the M of {pattern}. Exclude it with "
                "exclude_modules, or use another pattern or a sparsity."
            )


def check_unshared(model: nn.Module, layers: Mapping[str, PrunableLayer]) -> None:
    """Raise a `ValueError` that names the first layer whose weight another module uses too, for other inputs."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for own_name, parameter in module.named_parameters(recurse=False):
            users.setdefault(id(parameter), []).append(f"{name}.{own_name}" if name else own_name)
    for name, layer in layers.items():
        parameter_name = weight_name(name, layer)
        parameter = getattr(*_holder(layer))
        others = [other for other in users.get(id(parameter), ()) if other != parameter_name]
        if others:
            raise ValueError(
                f"{name} shares its weight with {others[0].removesuffix('.weight')}, which has different inputs. "
                "Exclude it with exclude_modules, or prune the model by magnitude."
            )


def weight_name(name: str, layer: PrunableLayer) -> str:
    """The name of the parameter of a model that a layer is, or is a part of."""
    return layer.stack_name if isinstance(layer, Expert) else f"{name}.weight"


def is_stored_inputs_first(layer: PrunableLayer) -> bool:
    """Whether the weight of a layer is stored as `(in_features, out_features)`."""
    return layer.is_transposed if isinstance(layer, Expert) else isinstance(layer, Conv1D)


def weight_matrix(layer: PrunableLayer) -> torch.Tensor:
    """A view of the weight as `(out_features, in_features)`: transposed for `Conv1D`, which stores (in, out)."""
    return layer.weight.T if is_stored_inputs_first(layer) else layer.weight


@torch.no_grad()
def apply_mask(layer: PrunableLayer, mask: torch.Tensor) -> None:
    """Set the weights of `layer` to +0.0 where `mask`, of shape `(out_features, in_features)`, is `False`."""
    # Filled rather than multiplied: -1.0 * 0 would be -0.0.
    weight_matrix(layer).masked_fill_(~mask, 0.0)


def _holder(layer: PrunableLayer) -> tuple[nn.Module, str]:
    """The module that has the weight of a layer, and the name of the parameter in it."""
    return (layer.module, layer.parameter_name) if isinstance(layer, Expert) else (layer, "weight")


def _matches(name: str, layer: PrunableLayer, wanted: str | Sequence[str]) -> bool:
    names = [name, name.rpartition(".")[0]] if isinstance(layer, Expert) else [name]
    return any(matches(one, wanted) for one in names)


def _warn_about_stacked_weights(name: str, blocks: nn.Module, experts: Iterable[Expert]) -> None:
    prunable = {id(getattr(*_holder(expert))) for expert in experts}
    stacked = [
        parameter_name
        for module_name, module in blocks.named_modules(prefix=name)
        if not is_linear_layer(module)
        for parameter_name, parameter in module.named_parameters(prefix=module_name, recurse=False)
        # DBRX has its experts one below another in a matrix
        if parameter.ndim > 2 or (parameter.ndim == 2 and is_fused_experts(parameter_name))
        if id(parameter) not in prunable
    ]
    if stacked:
        warnings.warn(
            f"{len(stacked)} weights in the blocks, such as {stacked[0]}, are not in linear layers and stay dense.",
            stacklevel=4,
        )


def _is_encoder_decoder(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    configs = [config, _text_config(config)]
    return any(getattr(one, "is_encoder_decoder", False) for one in configs)


def _text_config(config: object) -> object:
    """The configuration of the text model that a multimodal model has; of other models, their own."""
    return config.get_text_config() if isinstance(config, PreTrainedConfig) else config


def _modules_of_text_model(model: nn.Module) -> set[int]:
    """The ids of the text model's modules, without those of models nested in it, such as GIT's image encoder."""
    text_model = _text_model(model)
    kind = type(_text_config(getattr(model, "config", None)))
    nested = [one for one in text_model.modules() if isinstance(one, PreTrainedModel) and type(one.config) is not kind]
    others = {id(module) for one in nested for module in one.modules()}
    return {id(module) for module in text_model.modules()} - others


def _text_model(model: nn.Module) -> nn.Module:
    config = getattr(model, "config", None)
    if isinstance(model, PreTrainedModel) and _text_config(config) is not config:
        text_model: nn.Module = model.get_decoder()
        return text_model
    return model


def _default_targets(model: nn.Module) -> list[str]:
    in_blocks = linear_layers_in_blocks(dict(model.named_modules()))
    if _is_encoder_decoder(model):
        names = set(in_blocks.values())
    else:
        names = {find_blocks(model)[0]}
    experts = find_experts(model)
    for name in names:
        _warn_about_stacked_weights(name, model.get_submodule(name), experts.values())
    return [layer for layer, name in in_blocks.items() if name in names] + [
        layer for layer in experts if any(layer.startswith(f"{name}.") for name in names)
    ]


def _check_not_embeddings(model: nn.Module, layers: Mapping[str, PrunableLayer]) -> None:
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, layer in layers.items():
        if not isinstance(layer, Expert) and any(id(one) in embeddings for one in layer.parameters(recurse=False)):
            raise ValueError(
                f"{name} shares its weight with the embeddings, which pruning would change too. Exclude it with "
                "exclude_modules."
            )


def _linear_maps(layers: dict[str, PrunableLayer], named: bool) -> dict[str, PrunableLayer]:
    """The layers that compute what their class promises; for others, scores and masks would mean nothing."""
    reasons = {
        name: reason
        for name, layer in layers.items()
        if not isinstance(layer, Expert) and (reason := why_not_linear_map(layer)) is not None
    }
    if reasons:
        first, reason = next(iter(reasons.items()))
        what = f"{first}, a {type(layers[first]).__name__}, is not a linear map: {reason}."
        if named:
            raise ValueError(f"{what} Leave it out of target_modules, or exclude it with exclude_modules.")
        warnings.warn(f"{len(reasons)} layers stay dense. {what}", stacklevel=4)
    return {name: layer for name, layer in layers.items() if name not in reasons}


def _linear_weights(module: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in module.modules() if is_linear_layer(layer))
