# SPDX-License-Identifier: Apache-2.0
"""Merging into parameters that belong to no linear layer: those that an adapter has in `target_parameters`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.compressed_tensor import CompressedTensor
from ..checkpoints.conversion import Origin, find_origins
from ..checkpoints.empty_model import empty_model
from ..checkpoints.expert_rows import ExpertRows, expert_rows
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
    rows: tuple[ExpertRows, ...]


def find_parameters(checkpoint: Checkpoint, adapter: Adapter) -> dict[str, AdaptedParameter]:
    """
    Find the parameters that an adapter has factors of, by the names under which the factors are saved.

    PEFT nests the wrappers of several parameters of a module, and saves factors by their place in the nest. So the
    adapter is put into the model, without weights.
    """
    if not adapter.config.target_parameters:
        return {}
    try:
        model = empty_model(checkpoint.folder, checkpoint.config)
    except (ValueError, KeyError, ImportError, OSError) as error:
        raise ValueError(
            f"{adapter.folder} has target_parameters, and {checkpoint.folder} does not tell which parameters they "
            f"are: {message(error)}. {INSTEAD}"
        ) from error
    # of a tensor only what compressed ones have as well is asked for: its name, its shape, and to load it
    origins = find_origins(model, cast(Iterable[StoredTensor], checkpoint.dense.values()))
    return {
        saved: _parameter(saved, wrapper, origins, checkpoint, adapter)
        for saved, wrapper in _wrappers(model, adapter).items()
    }


def _wrappers(model: PreTrainedModel, adapter: Adapter) -> Mapping[str, ParamWrapper]:
    config = replace(adapter.config, target_modules=[], modules_to_save=None, base_model_name_or_path=None)
    SPPModel(model, config, "default", low_cpu_mem_usage=True)
    return {name: one for name, one in model.named_modules() if isinstance(one, ParamWrapper)}


def _parameter(
    saved: str, wrapper: ParamWrapper, origins: Mapping[str, Origin], checkpoint: Checkpoint, adapter: Adapter
) -> AdaptedParameter:
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
            f"{name!r}, and {checkpoint.folder} needs A {expected[0]} and B {expected[1]}: it belongs to another base "
            "model"
        )
    origin = origins.get(name)
    is_transposed = wrapper.fan_in_fan_out
    if origin is not None and any(
        isinstance(cast(object, one), CompressedTensor) and (is_transposed or len(one.shape) > 2)
        for one in origin.tensors
    ):
        raise ValueError(
            f"{checkpoint.folder} stores {name!r} as one compressed stack, whose rows are not merged one by one: run "
            "`peft-spp decompress` before the merge and `peft-spp compress` after it, or load model and adapter with "
            "peft_spp and call merge_and_unload()"
        )
    rows = None if origin is None else expert_rows(origin, name)
    if not rows or (wrapper.fan_in_fan_out and any(one.first for one in rows)):
        raise ValueError(
            f"{adapter.folder} adapts {name!r}, which Transformers makes of other tensors of {checkpoint.folder} in a "
            f"way that cannot be followed here. {INSTEAD}"
        )
    whole = replace(module, name=name, alpha=alpha_of(adapter.config, name))
    experts = tuple(_experts(whole, wrapper.num_experts, is_stack=len(origins[name].shapes[name]) == 3))
    shape = (wrapper.num_experts * wrapper.out_features, wrapper.in_features)
    return AdaptedParameter(name, shape, wrapper.fan_in_fan_out, experts, tuple(rows))


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
