# SPDX-License-Identifier: Apache-2.0
"""What a merge writes where: the tensors of an adapter, matched with those of a checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.compressed_tensor import CompressedTensor
from ..checkpoints.conversion import same_bits, stored_names
from ..checkpoints.empty_model import empty_model
from ..checkpoints.tensor_file import StoredTensor
from ..checkpoints.ties import TiedNames
from ..functional.row_blocks import check_row_blocks
from .adapter import INSTEAD, AdaptedModule, Adapter
from .parameters import AdaptedParameter, find_parameters


_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Merge:
    """A weight to merge an adapter into, or some rows of one."""

    weight: StoredTensor | CompressedTensor  # the weight as a matrix, which may be a part of a tensor
    module: AdaptedModule  # what the adapter holds for it
    transposed: bool  # whether the weight is stored `(in, out)`, as `Conv1D` does
    first: int = 0  # the first row that is in `weight`, if the others are elsewhere


@dataclass(frozen=True)
class Plan:
    """What changes in a checkpoint, by the names of its tensors."""

    merges: Mapping[str, list[Merge]]  # the weights to merge into, in the order of the bytes
    replaced: Mapping[str, StoredTensor]  # the tensors that trained ones take the place of
    stored: Mapping[str, str]  # what the checkpoint calls the adapted modules
    # the adapted parameters that are not weights of modules, by the names under which the adapter has their factors
    parameters: Mapping[str, AdaptedParameter]


def plan_merge(checkpoint: Checkpoint, adapter: Adapter) -> Plan:
    """Match an adapter with a checkpoint, and check that it fits."""
    parameters = find_parameters(checkpoint, adapter)
    modules = {name: module for name, module in adapter.modules.items() if name not in parameters}
    tied = TiedNames(checkpoint.config)
    shared = _trained_together(adapter, tied)
    trained = _without_copies(adapter, checkpoint, shared)
    wanted = [*(f"{name}.weight" for name in modules), *trained]
    found = _match(wanted, checkpoint, adapter) if wanted else {}
    for name, stored in [*found.items(), *((one.name, one.name) for one in parameters.values())]:
        if (name in tied or stored in tied) and not _stays_tied(name, checkpoint, shared, tied):
            raise ValueError(
                f"{adapter.folder} adapts {name!r}, whose weight is tied to another module, which Transformers would "
                f"change with it when it loads the merged model. {INSTEAD}"
            )
    for name, head in adapter.heads.items():
        weight = checkpoint.dense[found[name]]
        if weight.shape != head.shape or not same_bits(weight.load().to(head.load().dtype), head.load()):
            raise ValueError(
                f"{adapter.folder} has a weight of its own, {head.name!r}, which PEFT saves with an adapted head, and "
                f"{weight.file} has another. {INSTEAD}"
            )
    layout = checkpoint.layout
    merges: dict[str, list[Merge]] = {}
    for name, module in modules.items():
        weight = checkpoint.dense[found[f"{name}.weight"]]
        square_is_transposed = layout.is_transposed(weight.name.removesuffix(".weight"), len(weight.shape))
        transposed = _is_transposed(weight, module, square_is_transposed, adapter)
        merges[weight.name] = [Merge(weight, module, transposed)]
    for parameter in parameters.values():
        for rows in parameter.rows:
            _check_floating(rows.matrix)
            transposed = parameter.transposed != rows.flipped
            one = Merge(rows.matrix, parameter.experts[rows.expert], transposed, rows.first)
            merges.setdefault(rows.matrix.name, []).append(one)
    replaced = {found[name]: tensor for name, tensor in trained.items()}
    for name, tensor in replaced.items():
        _check_same_kind(checkpoint.dense[name], tensor)
    names = {name: found[f"{name}.weight"].removesuffix(".weight") for name in modules}
    return Plan(merges, replaced, names, parameters)


def _without_copies(adapter: Adapter, checkpoint: Checkpoint, shared: list[str]) -> dict[str, StoredTensor]:
    """The trained tensors; of those that stay tied only those that the checkpoint has, if it has one of them."""
    there = [name for name in shared if name in checkpoint.dense]
    return {name: one for name, one in adapter.trained.items() if not there or name not in shared or name in there}


def _stays_tied(name: str, checkpoint: Checkpoint, shared: list[str], tied: TiedNames) -> bool:
    """Whether a trained tensor is for all modules that share it, and everything that the checkpoint has of them."""
    stored = [one for one in checkpoint.dense if one in tied]
    return name in shared and (len(stored) == 1 or all(one in shared for one in stored))


def _trained_together(adapter: Adapter, tied: TiedNames) -> list[str]:
    """
    The trained tensors that were one in training: the adapter has it once for each module that shares it.

    The setting alone does not say so. PEFT ties nothing where it finds no second module.
    """
    shared = [name for name in adapter.trained if adapter.config.ensure_weight_tying and name in tied]
    values = [adapter.trained[name].load() for name in shared]
    return shared if len(shared) > 1 and all(same_bits(values[0], one) for one in values[1:]) else []


def _match(wanted: Collection[str], checkpoint: Checkpoint, adapter: Adapter) -> dict[str, str]:
    """Find each wanted tensor by its name, or all of them by one prefix more or less, or as Transformers renames them.

    The body of a model (`LlamaModel`) is saved without the prefix that its tensors have in the whole model
    (`LlamaForCausalLM`), and Transformers loads either from either. Multimodal models are saved under older names.
    """
    stored = checkpoint.dense
    missing = [name for name in wanted if name not in stored]
    if not missing:
        return {name: name for name in wanted}
    first = missing[0]
    added = {name.removesuffix(first) for name in stored if name.endswith(f".{first}")}
    removed = {first.removesuffix(name) for name in stored if first.endswith(f".{name}")}
    matches = [{name: prefix + name for name in wanted} for prefix in added]
    matches += [{name: name.removeprefix(prefix) for name in wanted if name.startswith(prefix)} for prefix in removed]
    matches = [
        match for match in matches if len(match) == len(wanted) and all(name in stored for name in match.values())
    ]
    if len(matches) > 1:
        raise ValueError(
            f"{adapter.folder} adapts {first!r}, and several tensors of {checkpoint.folder} match it: "
            f"{', '.join(sorted(repr(match[first]) for match in matches))}. {INSTEAD}"
        )
    if not matches:
        renamed = _names_in_the_model(checkpoint)
        if all(name in renamed for name in wanted):
            return {name: renamed[name] for name in wanted}
        raise ValueError(
            f"{adapter.folder} adapts {first!r}, which is not in {checkpoint.folder}. Either the adapter belongs to "
            "another base model, or Transformers builds this tensor from others when it loads the model (tied "
            f"weights, fused experts). {INSTEAD}"
        )
    return matches[0]


def _names_in_the_model(checkpoint: Checkpoint) -> dict[str, str]:
    """What the checkpoint calls the tensors of the model; nothing if Transformers cannot make the model."""
    if "model_type" not in checkpoint.config:
        return {}
    try:
        model = empty_model(checkpoint.folder, checkpoint.config)
    except (ValueError, KeyError, ImportError, OSError):
        return {}
    return stored_names(model, checkpoint.dense)


def _is_transposed(
    weight: StoredTensor | CompressedTensor, module: AdaptedModule, square_is_transposed: bool, adapter: Adapter
) -> bool:
    where = _check_floating(weight)
    shape = (module.B.shape[0], module.A.shape[1])
    if weight.shape not in (shape, shape[::-1]):
        raise ValueError(
            f"{where} has shape {weight.shape}, but the adapter in {adapter.folder} is for shape {shape} (out, in): "
            "it belongs to another base model"
        )
    check_row_blocks(shape[0], module.r)
    if shape[0] != shape[1]:
        return weight.shape != shape
    # PEFT's flag tells the layout of the layer that was adapted last. Layers of the other kind may have come before.
    if adapter.config.fan_in_fan_out and not square_is_transposed:
        raise ValueError(f"cannot tell whether {where} is stored (in, out) or (out, in). {INSTEAD}")
    return square_is_transposed


def _check_floating(weight: StoredTensor | CompressedTensor) -> str:
    """Check that factors can be merged into a stored matrix. It returns what to call it in messages."""
    where = f"tensor {weight.name!r} of {weight.file}"
    if isinstance(weight, CompressedTensor) and weight.old:
        raise ValueError(f"{where} is in a compressed-tensors format: run `peft-spp decompress` or `compress` first")
    if weight.dtype not in _DTYPES or len(weight.shape) != 2 or 0 in weight.shape:
        raise ValueError(
            f"{where} is {weight.describe()}. SPP adapters are merged into two-dimensional weights in float64, "
            "float32, bfloat16 or float16, and not into quantized ones."
        )
    return where


def _check_same_kind(stored: StoredTensor | CompressedTensor, trained: StoredTensor) -> None:
    compressed = isinstance(stored, CompressedTensor)
    if compressed or (stored.dtype, stored.shape) != (trained.dtype, trained.shape):
        raise ValueError(
            f"the adapter has {trained.name!r} as {trained.describe()}, but {stored.name!r} in {stored.file} is "
            f"{stored.describe()}: it cannot be replaced directly. {INSTEAD}"
        )
