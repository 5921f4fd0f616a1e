# SPDX-License-Identifier: Apache-2.0
"""Which layers of a model can be compressed, and which are worth it."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightTransform
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from ..architecture import find_expert_stacks, has_plain_forward
from ..checkpoints.names import warn_of_names_without_layers
from ..functional.bitmask import BITS, is_worth_it
from ..weight_reads import computes_with_weight


class Found(NamedTuple):
    """The weights of a model that can be compressed."""

    layers: dict[str, nn.Linear]  # by their names
    stacks: dict[str, tuple[nn.Module, str]]  # the module and its parameter, by the parameter's name
    kept: dict[str, str]  # why each other one cannot be, by `module_name`


def find_compressible(model: nn.Module, skip: Sequence[str] | None = None) -> Found:
    """
    Find the linear layers that can be compressed, and the parameters with the weights of all experts of a mixture.

    A warning names the entries of `skip` that leave out nothing.

    Args:
        model (`nn.Module`): Any model, on any device.
        skip (`Sequence[str]`, *optional*): See [`BitmaskConfig`].
    """
    skipped, tied = _skipped(model, skip)
    owners, places = _owners(model)
    layers: dict[str, nn.Linear] = {}
    stacks: dict[str, tuple[nn.Module, str]] = {}
    kept: dict[str, str] = {}

    def why_left_out(name: str, module: nn.Module, parameter: str) -> str | None:
        if name in tied or owners[id(module._parameters.get(parameter))] > 1 or places[id(module)] > 1:
            return "tied"
        return None if should_convert_module(module_name(name), skipped) else "left out"

    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        reason = why_left_out(f"{name}.weight", module, "weight") or _why_no_layer(model, name, module)
        if reason is None:
            layers[name] = module
        else:
            kept[name] = reason
    for name, (module, parameter) in find_expert_stacks(model).items():
        owner = name.removesuffix(f".{parameter}")
        reason = why_left_out(name, module, parameter) or _why_no_stack(model, owner, module, parameter)
        if reason is None:
            stacks[name] = (module, parameter)
        else:
            kept[module_name(name)] = reason

    names = [*layers, *map(module_name, stacks), *kept]
    warn_of_names_without_layers(
        lambda wanted: any(not should_convert_module(name, list(wanted)) for name in names),
        modules_to_not_convert=skip,
    )
    return Found(layers, stacks, kept)


def _why_no_layer(model: nn.Module, name: str, module: nn.Linear) -> str | None:
    if type(module) is not nn.Linear or not has_plain_forward(module) or _has_hooks(module):
        return "not a plain nn.Linear"
    if _is_read(model, name):
        return "its weight is read without calling it"
    if module._parameters.get("weight") is None:
        return "its weight is computed"
    return _why_no_values(module.weight)


def _why_no_stack(model: nn.Module, owner: str, module: nn.Module, parameter: str) -> str | None:
    if parametrize.is_parametrized(module) or isinstance(module, parametrize.ParametrizationList):
        return "its weight is computed"
    if "forward" in vars(module) or _has_hooks(module):
        return "its module has another forward pass than its class, or hooks"
    if _is_read(model, owner, parameter):
        return "it is read outside its module"
    return _why_no_values(module._parameters.get(parameter))


def _why_no_values(weight: Tensor | None) -> str | None:
    """Why the values of a weight cannot be stored; `None` if they can."""
    if weight is not None and weight.dtype in BITS and type(weight.data) is Tensor:
        return None
    return f"its weight is {None if weight is None else weight.dtype}"


def module_name(weight: str) -> str:
    """What a weight is called in reports and configurations: its module, and a parameter of another name itself."""
    return weight.removesuffix(".weight")


def why_not_worth_it(stored: int, shape: Sequence[int], dtype: torch.dtype, min_sparsity: float | None) -> str | None:
    """Why a weight with so many stored values is not compressed; `None` if it is to be."""
    numel = math.prod(shape)
    if not numel:
        return "it is empty"
    zeros = 1 - stored / numel
    worth_it = is_worth_it(stored, shape, dtype) if min_sparsity is None else zeros >= min_sparsity
    return None if worth_it else f"{math.floor(zeros * 1000) / 10}% zeros"


def converted_names(names: Sequence[str], transforms: Sequence[WeightTransform]) -> set[str]:
    """
    Those of a model's tensors that Transformers makes of others when it loads it, and takes apart when it saves it.
    """
    made = [one.reverse_transform() for one in transforms if isinstance(one, WeightConverter)]
    return {name for name in names if any(one.rename_source_key(name)[1] is not None for one in made)}


def warn_of_dense_layers(kept: Mapping[str, str]) -> None:
    """Say which layers and experts stay dense for another reason than that they were left out."""
    told = [f"{name} ({reason})" for name, reason in kept.items() if reason not in ("left out", "tied")]
    if told:
        warnings.warn(f"{len(told)} layers stay dense: {_first(told)}.", stacklevel=2)


def transformers_models(module: nn.Module) -> dict[str, PreTrainedModel]:
    """The outermost models of Transformers in a module, by name; `""` is the module itself."""
    found: dict[str, PreTrainedModel] = {}
    for name, inner in module.named_modules():
        if isinstance(inner, PreTrainedModel) and not any(not one or name.startswith(f"{one}.") for one in found):
            found[name] = inner
    return found


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _skipped(module: nn.Module, skip: Sequence[str] | None) -> tuple[list[str], set[str]]:
    """What is left out, and the names of tied parameters."""
    names: list[str] = list(skip or ())
    tied: set[str] = set()
    for prefix, model in transformers_models(module).items():
        start = f"{prefix}." if prefix else ""
        ties = model.all_tied_weights_keys
        tied |= {start + name for name in (*ties, *ties.values())}
        if skip is None:
            names += [start + name for name in HfQuantizer.get_modules_to_not_convert(model)]
    return names, tied


def _owners(model: nn.Module) -> tuple[Counter[int], Counter[int]]:
    """How many modules hold a parameter, and how many places hold a module."""
    owners = Counter(id(one) for module in model.modules() for one in module._parameters.values() if one is not None)
    return owners, Counter(id(child) for module in model.modules() for child in module._modules.values())


def _is_read(model: nn.Module, name: str, parameter: str = "weight") -> bool:
    """Whether a module around a layer computes with its weight, as `nn.TransformerEncoderLayer` does."""
    *parts, child = name.split(".")
    around = {type(model.get_submodule(".".join(parts[:at]))) for at in range(len(parts) + 1)}
    return bool(name) and computes_with_weight(around, child, parameter)


def _has_hooks(module: nn.Module) -> bool:
    return any(value for name, value in vars(module).items() if name.endswith(("_hook", "_hooks")))
