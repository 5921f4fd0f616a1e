# SPDX-License-Identifier: Apache-2.0
"""Which layers SPP adapts when the user names none, and which layers and parameters can be adapted."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import TaskType
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..architecture import (
    LinearLayer,
    find_expert_stacks,
    has_plain_forward,
    is_linear_layer,
    linear_layers_in_blocks,
    why_not_linear_map,
)
from ..checkpoints.names import plain_name
from ..compressed.experts import find_compressed_stacks
from .config import SPPConfig
from .engines import is_tensor_parallel, whole_parameters, whole_shape
from .module_names import own_modules
from .quantized import find_backend, how_to_dequantize, is_foreign


def transformer_block_linear_targets(model: nn.Module, layers_to_transform: list[int] | int | None = None) -> set[str]:
    """
    Names for `target_modules` that select the linear layers inside the model's transformer blocks, and no others.

    Embeddings, heads and poolers lie outside the blocks; the routers of a mixture are left out. See
    [`~peft_spp.architecture.linear_layers_in_blocks`].
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
        suffix = shortest_unambiguous_suffix(inner_name, others)
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
    """The parameters that hold the weights of all experts of a mixture, which are not linear layers."""
    return [plain_name(name) for name in (*find_expert_stacks(model), *find_compressed_stacks(model))]


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear layer, quantized or not, or a tuner layer around one."""
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    return is_linear_layer(module) or find_backend(module) is not None


def why_not_adaptable(layer: nn.Module) -> str | None:
    """Tell why a layer that is linear by its class cannot be adapted: it computes something else."""
    base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    if not is_linear_layer(base) or has_plain_forward(base) or find_backend(base) is not None:
        return None
    with whole_parameters(base):
        return why_not_linear_map(base)


def other_maps(model: nn.Module, names: Collection[str] | None = None) -> dict[str, str]:
    """The layers that are linear by their class and compute something else."""
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


# PEFT adds all of these for tasks with a head, whichever the model has
_HEADS_OF_TASKS = {"classifier", "score", "qa_outputs"}


def names_without_modules(model: nn.Module, config: SPPConfig) -> dict[str, list[str]]:
    """The entries of `target_modules` and `modules_to_save` that no module is called by, which may be misspelled."""
    targets = config.target_modules
    names = [name for name, _ in _modules_outside_adapters(model)]
    ends = {name[start:] for name in names for start in (0, *(dot.end() for dot in re.finditer(r"\.", name)))}
    found = {
        "target_modules": [] if targets is None or isinstance(targets, str) else sorted(set(targets) - ends),
        # by PEFT's rule, the end of a part will do
        "modules_to_save": [
            one
            for one in config.modules_to_save or ()
            if one not in _HEADS_OF_TASKS and not any(name.endswith(one) for name in names)
        ],
    }
    return {setting: missing for setting, missing in found.items() if missing}


def warn_of_names_without_modules(model: nn.Module, config: SPPConfig) -> None:
    """Say which names of a new adapter's settings were not found. PEFT does if no target was."""
    for setting, missing in names_without_modules(model, config).items():
        warnings.warn(
            f"{setting}: no module of {type(model).__name__} is called {', '.join(map(repr, missing))}. The adapter "
            "has the others only.",
            stacklevel=2,
        )


def shortest_unambiguous_suffix(name: str, others: Iterable[str]) -> str | None:
    """The least of a name's last parts that none of the others ends with."""
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


def check_not_split(layer: nn.Module, module_name: str) -> None:
    """Check that tensor parallelism has not split a layer."""
    if is_tensor_parallel(layer):
        raise ValueError(
            f"Target module {module_name!r} ({type(layer).__name__}) is split by tensor parallelism, which SPP does "
            "not support. Load the base model without a `tp_plan`, and shard it with FSDP or DeepSpeed ZeRO-3 if it "
            "is too large; or leave the module out of `target_modules`."
        )


def check_linear(layer: LinearLayer, module_name: str) -> None:
    """Check that a layer computes what its class promises, with a plain floating-point matrix."""
    kind = f"{type(layer).__module__}.{type(layer).__name__}"
    if reason := why_not_adaptable(layer):
        raise ValueError(
            f"Target module {module_name!r} ({kind}) is not supported: it does not compute `x @ weight.T + bias`, "
            f"{reason}. Leave it out of `target_modules`, or name it in `exclude_modules`."
        )
    weight, name = getattr(layer, "weight", None), f"Target module {module_name!r} ({kind})"
    check_weight(weight, name, instead=how_to_dequantize(layer))


def warn_of_other_maps(others: Mapping[str, str]) -> None:
    """Warn of layers that are linear by their class, and left out because they compute something else."""
    if not others:
        return
    shown = "; ".join(f"{name}: {reason}" for name, reason in list(others.items())[:3])
    warnings.warn(
        f"{len(others)} layers have the class of a linear layer, but do not compute `x @ weight.T + bias`, and are "
        f"not adapted: {shown}.",
        stacklevel=2,
    )


def check_not_saved_whole(module_name: str, modules_to_save: Sequence[str] | None) -> None:
    """
    Check that a target is not in a module that `modules_to_save` names as well.

    PEFT leaves targets out that are named there, but wraps any module whose name has that end: `"proj"` is also
    `q_proj`.
    """
    parts = module_name.split(".")
    for at in range(len(parts)):
        name = ".".join(parts[: at + 1])
        end = next((one for one in modules_to_save or () if name.endswith(one)), None)
        if end is not None:
            where = "is" if name == module_name else f"is in {name!r}, which is"
            raise ValueError(
                f"Target module {module_name!r} {where} also trained and saved in full, because its name ends with "
                f"{end!r} from `modules_to_save`. Use the full name there, or exclude the target with "
                "`exclude_modules`."
            )


def check_weight(
    weight: torch.Tensor | None, name: str, dimensions: tuple[int, ...] = (2,), instead: str | None = None
) -> None:
    """
    Check that a weight is a plain floating-point matrix, or a stack of them where that may be. `instead` says how to
    load the base model with one.
    """
    shape = () if weight is None else whole_shape(weight)
    supported = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    if weight is None or weight.dtype not in supported or len(shape) not in dimensions or is_foreign(weight):
        found = "no weight" if weight is None else f"a weight of dtype {weight.dtype} and shape {shape}"
        if weight is not None and is_foreign(weight):
            found = f"a weight of type {type(weight).__module__}.{type(weight).__name__}"
        wanted = "two-dimensional weights" if dimensions == (2,) else "weights of two dimensions, and stacks of them,"
        raise ValueError(
            f"{name} has {found}. SPP adapts {wanted} in float64, float32, bfloat16 or float16: "
            f"{instead or 'load the base model in one of these'}, leave it out of the targets, or, for an unsupported "
            "quantization format, add a reader with `peft_spp.tuner.quantized.register_backend`."
        )


def warn_of_fused_experts(model: nn.Module) -> None:
    """Warn of the experts that the default targets leave out. See [`fused_experts`]."""
    experts = fused_experts(model)
    if not experts:
        return
    kinds = sorted({re.sub(r"^.*?\.\d+\.", "", name) for name in experts})
    warnings.warn(
        f"The default targets are linear layers. The model also has {len(experts)} parameters with the weights of "
        f"experts, which are not adapted: {', '.join(kinds)}. Pass `target_parameters={kinds}` to adapt them too, or "
        "`target_parameters=[]` if this is intended.",
        stacklevel=2,
    )


def heads_saved_whole(config: SPPConfig) -> list[str]:
    """
    The heads that PEFT adds to `modules_to_save` for a task after the adapter has been injected.

    For sequence classification it does so before, and the heads are not adapted; the other tasks should not differ.
    """
    names: dict[Any, list[str]] = {TaskType.TOKEN_CLS: ["classifier", "score"], TaskType.QUESTION_ANS: ["qa_outputs"]}
    heads = names.get(config.task_type, [])
    return [name for name in heads if name not in (config.modules_to_save or [])]


def saved_with_ties(modules_to_save: Sequence[str], embedding: str, tied: Iterable[str]) -> list[str]:
    """
    What to train and save in full where some of it is tied to the embedding: that, and not the modules tied to it.

    Args:
        modules_to_save (`Sequence[str]`): What the configuration names.
        embedding (`str`): The name of the input embedding.
        tied (`Iterable[str]`): The names of the modules that have its weight.
    """
    kept = [one for one in modules_to_save if not any(_names(one, module) for module in tied)]
    return kept if any(_names(one, embedding) for one in kept) else [*kept, embedding]


def tied_embeddings(model: nn.Module, modules_to_save: Sequence[str]) -> list[str]:
    """The embeddings that a model ties, if there are several and some of what is tied is to be saved in full."""
    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    tied = sorted({name.rpartition(".")[0] for name in (*ties, *ties.values())})
    embeddings = {id(one): name for name in tied if isinstance(one := model.get_submodule(name), nn.Embedding)}
    is_saved = any(_names(one, module) for one in modules_to_save for module in tied)
    return list(embeddings.values()) if is_saved and len(embeddings) > 1 else []


def _names(one: str, module: str) -> bool:
    """Whether `modules_to_save` means a module by a name."""
    return f".{one}." in f".{module}."


def check_task(model: nn.Module, config: SPPConfig) -> None:
    """Check that a model can be wrapped for the task of an adapter, before the adapter is injected."""
    generates = config.task_type in (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM)
    if generates and not hasattr(model, "prepare_inputs_for_generation"):
        raise AttributeError(
            f"{type(model).__name__} has no `prepare_inputs_for_generation`, which `task_type={config.task_type!s}` "
            "needs. Load the model with the head of a language model, or leave `task_type` out."
        )
