# SPDX-License-Identifier: Apache-2.0
"""Which layers SPP adapts when the user names none."""

from __future__ import annotations

from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..sparsity.names import is_fused_experts, plain_name, special_role
from .module_names import own_modules
from .quantized import find_backend


def transformer_block_linear_targets(model: nn.Module, layers_to_transform: list[int] | int | None = None) -> set[str]:
    """
    Names for `target_modules` that select every linear layer inside the model's transformer blocks, and nothing else.

    The blocks are the elements of the model's outermost `nn.ModuleList`s that have linear layers inside: `layers` of a
    Llama, `h` of a GPT-2, `encoder.block` and `decoder.block` of a T5. Embeddings, heads and poolers lie outside them.

    Args:
        model (`nn.Module`): The model; it may have adapters already.
        layers_to_transform (`Union[List[int], int]`, *optional*): The blocks to keep, where a layer can only be told
            from one outside the blocks by its full name, which PEFT does not check against the layer index.

    Returns:
        `set[str]`: The shortest unambiguous ends of the names, such as `{"q_proj", "output.dense"}`; empty if the
        model has no such blocks.
    """
    modules = dict(_modules_outside_adapters(model))
    block_lists: list[str] = []
    for name, module in modules.items():
        inside_another = any(name.startswith(f"{outer}.") for outer in block_lists)
        if isinstance(module, nn.ModuleList) and not inside_another and _is_block_list(module):
            block_lists.append(name)

    # name of the layer -> its name inside the block
    targets: dict[str, str] = {}
    for name, module in modules.items():
        if is_linear(module) and not _returns_a_choice(name, module):
            for block_list in block_lists:
                if name.startswith(f"{block_list}."):
                    targets[name] = name.removeprefix(f"{block_list}.").partition(".")[2]

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
    """Whether the module is a linear layer, quantised or not, or a tuner layer around one."""
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    return isinstance(module, (nn.Linear, Conv1D)) or find_backend(module) is not None


def _returns_a_choice(name: str, module: nn.Module) -> bool:
    # the routers of some mixtures (Llama 4, PhiMoE) are linear layers that return scores of the experts they choose
    return special_role(plain_name(name)) == "router" and type(module).forward is not nn.Linear.forward


def _modules_outside_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All named modules but the parts of tuner layers."""
    inside: str | None = None
    for name, module in own_modules(model):
        if inside is not None and name.startswith(inside):
            continue
        inside = f"{name}." if isinstance(module, BaseTunerLayer) else None
        yield name, module


def _is_block_list(module: nn.ModuleList) -> bool:
    # a list of bare linear layers is a set of heads, not of blocks
    return not any(is_linear(block) for block in module) and any(
        is_linear(layer) for block in module for layer in block.modules()
    )


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
