# SPDX-License-Identifier: Apache-2.0
"""Merging into parameters that belong to no linear layer: those that an adapter has in `target_parameters`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.conversion import Origins
from ..checkpoints.empty_model import empty_model
from ..checkpoints.expert_rows import ExpertRows, expert_rows
from ..checkpoints.safetensors_files import read_config
from ..checkpoints.tensor_file import StoredTensor
from ..error_text import message
from ..tuner import ParamWrapper, SPPModel
from ..tuner.saved_adapter import alpha_of
from .adapter import INSTEAD, AdaptedModule, Adapter


@dataclass(frozen=True)
class AdaptedParameter:
    """What an adapter holds for one parameter: a stack of experts, or one weight.

    Args:
        name (`str`): The name of the parameter in the model.
        shape (`tuple[int, int]`): The number of outputs of all experts, and of inputs.
        transposed (`bool`): Whether each expert is stored `(in, out)`.
        experts (`tuple[AdaptedModule, ...]`): What it holds for each expert.
        rows (`tuple[ExpertRows, ...]`): Where the checkpoint has them, in the order of the rows.
    """

    name: str
    shape: tuple[int, int]
    transposed: bool
    experts: tuple[AdaptedModule, ...]
    rows: tuple[ExpertRows, ...] = ()


def find_parameters(checkpoint: Checkpoint, adapter: Adapter) -> dict[str, AdaptedParameter]:
    """Find the parameters that an adapter has factors of, by the names under which the factors are saved."""
    if not adapter.config.target_parameters:
        return {}
    model = _empty_model(checkpoint.folder, checkpoint.config, adapter)
    # of a tensor only what compressed ones have as well is asked for: its name, its shape, and to load it
    origins = Origins(model, cast(Iterable[StoredTensor], checkpoint.dense.values()))
    return {
        saved: replace(one, rows=_rows(one, origins, checkpoint, adapter))
        for saved, one in _read(model, checkpoint.folder, adapter).items()
    }


def read_parameters(folder: Path, adapter: Adapter) -> dict[str, AdaptedParameter]:
    """The same without `rows`, of a base model of which only the `config.json` is read."""
    if not adapter.config.target_parameters:
        return {}
    return _read(_empty_model(folder, read_config(folder), adapter), folder, adapter)


def _empty_model(folder: Path, config: Mapping[str, Any], adapter: Adapter) -> PreTrainedModel:
    try:
        return empty_model(folder, config)
    except (ValueError, KeyError, ImportError, OSError) as error:
        raise ValueError(
            f"{adapter.folder} has target_parameters, and {folder} does not tell which parameters they are: "
            f"{message(error)}. {INSTEAD}"
        ) from error


def _read(model: PreTrainedModel, folder: Path, adapter: Adapter) -> dict[str, AdaptedParameter]:
    # PEFT nests the wrappers of several parameters of a module, and saves factors by their place in the nest. So the
    # adapter is put into the model, without weights.
    config = replace(adapter.config, target_modules=[], modules_to_save=None, base_model_name_or_path=None)
    SPPModel(model, config, "default", low_cpu_mem_usage=True)
    wrappers = {name: one for name, one in model.named_modules() if isinstance(one, ParamWrapper)}
    return {saved: _parameter(saved, wrapper, folder, adapter) for saved, wrapper in wrappers.items()}


def _parameter(saved: str, wrapper: ParamWrapper, folder: Path, adapter: Adapter) -> AdaptedParameter:
    name = wrapper.module_name
    module = adapter.modules.get(saved)
    if module is None:
        raise ValueError(
            f"{adapter.folder} is missing the factors of {name!r}, which its target_parameters name. Copy it again, "
            "or load an earlier checkpoint."
        )
    expected = [tuple(cast(Tensor, one["default"].weight).shape) for one in (wrapper.spp_A, wrapper.spp_B)]
    if [module.A.shape, module.B.shape] != expected:
        raise ValueError(
            f"the adapter in {adapter.folder} has factors of shapes A {module.A.shape} and B {module.B.shape} for "
            f"{name!r}, and {folder} needs A {expected[0]} and B {expected[1]}: it belongs to another base model"
        )
    stack = cast(Tensor, getattr(wrapper.get_base_layer(), wrapper.parameter_name))
    whole = replace(module, name=name, alpha=alpha_of(adapter.config, name))
    experts = tuple(_experts(whole, wrapper.num_experts, is_stack=stack.ndim == 3))
    shape = (wrapper.num_experts * wrapper.out_features, wrapper.in_features)
    return AdaptedParameter(name, shape, wrapper.fan_in_fan_out, experts)


def _rows(
    parameter: AdaptedParameter, origins: Origins, checkpoint: Checkpoint, adapter: Adapter
) -> tuple[ExpertRows, ...]:
    """Where a checkpoint has the rows of a parameter."""
    name, transposed = parameter.name, parameter.transposed
    origin = origins.whole(name, checkpoint.folder, INSTEAD)
    rows = expert_rows(origin, name)
    if not rows or (transposed and any(one.first for one in rows)):
        raise ValueError(
            f"{adapter.folder} adapts {name!r}, which Transformers makes of other tensors of {checkpoint.folder} in a "
            f"way that cannot be followed here. {INSTEAD}"
        )
    return tuple(rows)


def _experts(module: AdaptedModule, count: int, is_stack: bool) -> Iterator[AdaptedModule]:
    """The experts one by one, under the names that `peft-spp prune` gives them."""
    r, outputs = module.A.shape[0] // count, module.B.shape[0] // count
    for index in range(count):
        yield AdaptedModule(
            f"{module.name.removesuffix('.weight')}.{index}" if is_stack else module.name.removesuffix(".weight"),
            module.A.rows(index * r, (index + 1) * r),
            module.B.rows(index * outputs, (index + 1) * outputs),
            module.alpha,
        )
