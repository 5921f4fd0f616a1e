# SPDX-License-Identifier: Apache-2.0
"""Which layers SPP adapts when the user names none."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..architecture import has_plain_forward, is_linear_layer, linear_layers_in_blocks, why_not_linear_map
from ..sparsity.names import is_fused_experts, plain_name
from .module_names import own_modules
from .quantized import find_backend
from .whole_parameters import whole_parameters


def transformer_block_linear_targets(model: nn.Module, layers_to_transform: list[int] | int | None = None) -> set[str]:
    """
    Names for `target_modules` that select the linear layers inside the model's transformer blocks, and no others.

    Embeddings, heads and poolers lie outside the blocks; the routers of a mixture are left out. See
    [`~peft_spp.architecture.linear_layers_in_blocks`].

    Args:
        model (`nn.Module`): The model; it may have adapters already.
        layers_to_transform (`Union[List[int], int]`, *optional*): The blocks to keep, where a layer can only be told
            from one outside the blocks by its full name, which PEFT does not check against the layer index.

    Returns:
        `set[str]`: The shortest unambiguous ends of the names, such as `{"q_proj", "output.dense"}`; empty if the
        model has no such blocks.
    """
    modules = dict(_modules_outside_adapters(model))
    # name of the layer -> its name inside the block
    targets = {
        name: name.removeprefix(f"{block_list}.").partition(".")[2]
        for name, block_list in linear_layers_in_blocks(modules, is_linear).items()
        if why_not_adaptable(modules[name]) is None
    }
    others = [name for name in modules if name not in targets]
    suffixes: set[str] = set()
    for inner_name in sorted(set(targets.values())):
        suffix = _shortest_unambiguous_suffix(inner_name, others)
        if suffix is not None:
            suffixes.add(suffix)
        else:
            suffixes.update(
                name
                for name, inner in targets.items()
                if inner == inner_name and _is_selected(name.removesuffix(f".{inner}"), layers_to_transform)
            )
    return suffixes


def fused_experts(model: nn.Module) -> list[str]:
    """
    The parameters that hold the weights of all experts of a mixture, which are no linear layers.

    Args:
        model (`nn.Module`): The model; it may have adapters already.

    Returns:
        `list[str]`: Their names in the model without adapters, such as `"model.layers.0.mlp.experts.down_proj"`.
    """
    names = []
    for name, parameter in model.named_parameters():
        plain = plain_name(name)
        if parameter.ndim == 3 and is_fused_experts(plain.removesuffix(".weight")):
            names.append(plain)
    return names


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear layer, quantized or not, or a tuner layer around one."""
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    return is_linear_layer(module) or find_backend(module) is not None


def why_not_adaptable(layer: nn.Module) -> str | None:
    """
    Tell why a layer that is linear by its class cannot be adapted: it computes something else.

    Args:
        layer (`nn.Module`): Any module; it may have adapters already.

    Returns:
        `str` or `None`: The reason; `None` for a linear map, a quantized layer or another module.
    """
    base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    if not is_linear_layer(base) or has_plain_forward(base) or find_backend(base) is not None:
        return None
    with whole_parameters(base):
        return why_not_linear_map(base)


def other_maps(model: nn.Module, names: Collection[str] | None = None) -> dict[str, str]:
    """
    The layers that are linear by their class and compute something else.

    Args:
        model (`nn.Module`): The model; it may have adapters already.
        names (`Collection[str]`, *optional*): The layers to look at, by default those of the transformer blocks.

    Returns:
        `dict[str, str]`: Their names, and why they are not adapted.
    """
    modules = dict(_modules_outside_adapters(model))
    if names is None:
        names = linear_layers_in_blocks(modules, is_linear)
    reasons = {name: why_not_adaptable(module) for name, module in modules.items() if name in names}
    return {name: f"{type(modules[name]).__name__}, {reason}" for name, reason in reasons.items() if reason}


def _modules_outside_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All named modules but the parts of tuner layers."""
    inside: str | None = None
    for name, module in own_modules(model):
        if inside is not None and name.startswith(inside):
            continue
        inside = f"{name}." if isinstance(module, BaseTunerLayer) else None
        yield name, module


def _shortest_unambiguous_suffix(name: str, others: list[str]) -> str | None:
    parts = name.split(".")
    for start in range(len(parts) - 1, -1, -1):
        suffix = ".".join(parts[start:])
        if not any(other == suffix or other.endswith(f".{suffix}") for other in others):
            return suffix
    return None


def _is_selected(block_name: str, layers_to_transform: list[int] | int | None) -> bool:
    if layers_to_transform is None or layers_to_transform == []:
        return True
    indices = [layers_to_transform] if isinstance(layers_to_transform, int) else layers_to_transform
    return int(block_name.rpartition(".")[2]) in indices
