# SPDX-License-Identifier: Apache-2.0
"""Which tensors an adapter has in a model, counted against those in a file at both ends: loading and saving.

Names are those of a saved adapter without PEFT's prefix, and without the parts that engines add around modules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..checkpoints.names import WRAPPER_PARTS, unwrapped_name
from .adapter_files import FACTOR, PREFIX
from .layer_factors import SPPLayer
from .module_names import ModuleNames, own_modules


if TYPE_CHECKING:
    from .config import SPPConfig


BY_ADAPTER = frozenset(
    {
        "spp_A",
        "spp_B",
        "spp_dropout",
        "modules_to_save",
        "trainable_tokens_delta",
        "trainable_tokens_original",
    }
)
"""The containers whose entries have the names of adapters."""

# how many tensors a message names
_SHOWN = 3


def adapter_layers(model: nn.Module, adapter_name: str) -> dict[str, SPPLayer]:
    return {
        name.removeprefix(PREFIX): module
        for name, module in own_modules(model)
        if isinstance(module, SPPLayer) and adapter_name in module.spp_A
    }


def saved_name(name: str) -> str:
    """The name of a module or tensor as it is saved, without PEFT's prefix."""
    return unwrapped_name(name).removeprefix(PREFIX)


def expected_tensors(model: nn.Module, config: SPPConfig, adapter_name: str) -> dict[str, tuple[int, ...] | None]:
    """The tensors that an adapter consists of, read off the model."""
    expected: dict[str, tuple[int, ...] | None] = {}
    for name, layer in adapter_layers(model, adapter_name).items():
        rows = layer.num_experts * layer.r[adapter_name], layer.num_experts * layer.out_features
        expected[f"{name}.spp_A.weight"] = (rows[0], layer.in_features)
        expected[f"{name}.spp_B.weight"] = (rows[1], 1)
    inside: list[str] = []
    for name, module in own_modules(model):
        if isinstance(module, AuxiliaryTrainingWrapper):
            inside.append(f"{name}.")
            expected |= {
                f"{name}.{key}".removeprefix(PREFIX): None for key in module.adapter_state_dict_load_map(adapter_name)
            }
    expected |= dict.fromkeys(_biases(model, config, tuple(inside)))
    return expected


def _biases(model: nn.Module, config: SPPConfig, inside: tuple[str, ...]) -> Iterator[str]:
    if config.bias == "none":
        return
    for name, module in own_modules(model):
        if isinstance(module, BaseTunerLayer) and getattr(module.get_base_layer(), "bias", None) is not None:
            depth, base = 1, getattr(module, "base_layer", None)
            while isinstance(base, BaseTunerLayer):
                depth, base = depth + 1, getattr(base, "base_layer", None)
            yield f"{name}{'.base_layer' * depth}.bias".removeprefix(PREFIX)
        elif config.bias == "all" and "base_layer" not in name.split(".") and not f"{name}.".startswith(inside):
            if module._parameters.get("bias") is not None:
                yield (f"{name}.bias" if name else "bias").removeprefix(PREFIX)


def check_count(
    origin: str,
    names: Collection[str],
    model: nn.Module,
    config: SPPConfig,
    adapter_name: str,
    *,
    may_be_renamed: bool = False,
    may_have_biases: bool = False,
) -> None:
    """Check that the tensors of a saved adapter are all that the model has for it, and that each has a place in it."""
    plain = ModuleNames(model).plain
    have, want = {saved_name(plain(name)) for name in names}, expected_tensors(model, config, adapter_name)
    missing = [name for name in want if name not in have]
    left = sorted(have - want.keys())
    if may_have_biases:
        biases = {f"{owner.removeprefix(PREFIX)}.bias" for owner, _ in own_modules(model)}
        left = [name for name in left if name not in biases]
    left = [name for name in left if not has_place(name, model, adapter_name)] if left else []
    if not missing and not left:
        return
    if may_be_renamed and _ends(missing) == _ends(left):
        return
    problems = []
    if missing:
        problems.append(f"is missing {len(missing)} of the {len(want)} tensors of the adapter ({_listed(missing)})")
    if left:
        problems.append(f"has {len(left)} tensors that do not belong to any module of the model ({_listed(left)})")
    raise ValueError(
        f"{origin} {' and '.join(problems)}. The adapter was made for another model or with other settings, or the "
        "file is incomplete: load an earlier checkpoint, or the base model that it was trained on."
    )


def _ends(names: Iterable[str]) -> Counter[str]:
    return Counter(".".join(name.split(".")[-3:]) for name in names)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def has_place(name: str, model: nn.Module, adapter_name: str) -> bool:
    """Whether a tensor that is not part of the adapter is loaded into the model all the same: embeddings alone are."""
    if FACTOR.fullmatch(name):
        return False
    owner_name, _, tensor = name.rpartition(".")
    heads = head_modules(model)
    # with bias="all" PEFT saves the bias of a module to save as such and as that of its original, too
    wrappers = tuple(
        f"{n.removeprefix(PREFIX)}." for n, m in own_modules(model) if isinstance(m, AuxiliaryTrainingWrapper)
    )
    return any(
        tensor in module._parameters
        and (isinstance(module, nn.Embedding) or module in heads or name.startswith(wrappers or ("\n",)))
        for other, module in own_modules(model)
        if other.removeprefix(PREFIX) in (owner_name, f"{owner_name}.{adapter_name}")
    ) or any("_flat_param" in parameter for parameter, _ in model.named_parameters())


def head_modules(model: nn.Module) -> set[nn.Module]:
    """The output embeddings and the modules in them."""
    output_embeddings: Any = getattr(model, "get_output_embeddings", None)
    head = output_embeddings() if output_embeddings is not None else None
    return set(head.modules()) if isinstance(head, nn.Module) else set()


def check_saved(written: Iterable[str], model: nn.Module, config: SPPConfig, adapter_name: str) -> None:
    have, want = {saved_name(name) for name in written}, expected_tensors(model, config, adapter_name)
    missing = [name for name in want if name not in have]
    if missing:
        raise RuntimeError(
            f"{len(missing)} of the {len(want)} tensors of adapter {adapter_name!r} would not be saved: "
            f"{_listed(missing)}. Nothing was written. If you pass a `state_dict`, it must contain all of them."
        )


def restore_tensors(model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> None:
    """
    Put back what PEFT has taken for another adapter's tensors.

    PEFT drops all keys with the name of another adapter between two dots. If that is the name of a module too, such as
    `mlp`, the tensors of this adapter in and below the module are dropped with them.
    """
    others = other_adapters(model, adapter_name)
    if not _module_parts(model).intersection(others):
        return
    for key, tensor in model.state_dict().items():
        if key in state_dict or any(belongs_to(key, other) for other in others):
            continue
        if not _is_part(tensor):
            state_dict[key] = tensor
        elif belongs_to(key, adapter_name):
            raise RuntimeError(
                f"The tensor {key} cannot be saved: it is sharded, and PEFT would mistake it for a tensor of another "
                f"adapter whose name is also a module's name (one of {', '.join(map(repr, others))}). Delete that "
                "adapter, and add it again under another name."
            )


def other_adapters(model: nn.Module, adapter_name: str) -> list[str]:
    return [name for name in getattr(model, "peft_config", {}) if name != adapter_name]


def belongs_to(key: str, adapter_name: str) -> bool:
    """Whether a tensor of a model is an adapter's, and not only in a module of the same name."""
    parts = key.split(".")
    return any(part == adapter_name and before in BY_ADAPTER for before, part in pairwise(parts))


def _is_part(tensor: torch.Tensor) -> bool:
    """Whether a tensor of a state dict holds only a part of the values, the others being elsewhere."""
    return type(tensor).__name__ == "DTensor" or hasattr(tensor, "ds_shape") or tensor.is_meta


def _module_parts(model: nn.Module) -> set[str]:
    """The parts of the names of a model's own modules."""
    return {
        part
        for name, _ in model.named_modules()
        for before, part in pairwise(["", *name.split(".")])
        if before not in BY_ADAPTER
    }


def check_can_be_saved(model: nn.Module, adapter_name: str) -> None:
    """Refuse to add an adapter whose name PyTorch does not take, or that PEFT would not save as a whole."""
    if not adapter_name or "." in adapter_name:
        raise ValueError(f"The adapter name {adapter_name!r} is empty or has a dot in it. Choose another name.")
    if hasattr(nn.ModuleDict, adapter_name) or adapter_name in vars(nn.ModuleDict()):
        raise ValueError(
            f"The adapter name {adapter_name!r} is also the name of an attribute of `torch.nn.ModuleDict`, in which "
            "PEFT keeps adapters. Choose another name."
        )
    parameters = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    if adapter_name in BY_ADAPTER.union(WRAPPER_PARTS, parameters, ["base_layer"]):
        raise ValueError(
            f"The adapter name {adapter_name!r} is also the name of a parameter, of a wrapper or of a part of an "
            "adapted layer, so PEFT would save its tensors under other names. Choose another name."
        )
