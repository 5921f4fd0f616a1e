# SPDX-License-Identifier: Apache-2.0
"""Which tensors of a checkpoint are weights of linear layers that can be compressed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import transformers
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.compressed_format import names_format
from ..checkpoints.compressed_tensor import CompressedTensor
from ..checkpoints.conversion import Origin, Origins
from ..checkpoints.empty_model import empty_model
from ..checkpoints.old_compressed_files import CONFIG_KEYS, without_empty_formats
from ..checkpoints.tensor_file import StoredTensor
from ..functional.bitmask import BITS
from .expert_converters import ExpertConverters
from .selection import find_compressible, module_name


INSTEAD = "Load the model with from_pretrained and quantization_config=BitmaskConfig(), and save it instead."


class StoredLayer(NamedTuple):
    """A layer of a checkpoint that can be compressed.

    Args:
        shape (`tuple[int, ...]`): The shape of its weight in the model.
        tensors (`tuple[StoredTensor | CompressedTensor, ...]`): What is stored of it; of experts, often a tensor for
            each of them.
    """

    shape: tuple[int, ...]
    tensors: tuple[StoredTensor | CompressedTensor, ...]


def find_layers(
    checkpoint: Checkpoint, skip: Sequence[str] | None = None
) -> tuple[dict[str, StoredLayer], dict[str, str]]:
    """
    The linear layers and stacks of experts that can be compressed, by [`module_name`] in the model that Transformers
    loads, and for each other one why not.
    """
    model = _empty_model(checkpoint)
    layers, stacks, kept = find_compressible(model, skip)
    experts = ExpertConverters(model, get_model_conversion_mapping(model))
    shapes = {f"{name}.weight": tuple(layer.weight.shape) for name, layer in layers.items()}
    shapes |= {name: tuple(owner.get_parameter(parameter).shape) for name, (owner, parameter) in stacks.items()}
    origins = Origins(model, cast(Iterable[StoredTensor], checkpoint.dense.values()))
    found: dict[str, StoredLayer] = {}
    for name, shape in shapes.items():
        origin, shown = origins.get(name), module_name(name)
        is_whole = origin is not None and origin.shapes == {name: shape}
        if origin is None or not is_whole or not _can_compress(origin, name in stacks, experts):
            kept[shown] = "stored in another form"
        elif any(one.dtype not in BITS for one in origin.tensors):
            kept[shown] = f"its weight is {str(origin.tensors[0].dtype).removeprefix('torch.')}"
        else:
            found[shown] = StoredLayer(shape, tuple(origin.tensors))
    return found, kept


def _can_compress(origin: Origin, is_stack: bool, experts: ExpertConverters) -> bool:
    if origin.converter is None:
        return True
    return is_stack and experts.can_compress(origin.first, origin.shapes[origin.first])


def plain_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The configuration of a checkpoint without what it says of compression."""
    said = CONFIG_KEYS if checkpoint.compressed or names_format(checkpoint.config) else ()
    return {name: value for name, value in without_empty_formats(checkpoint.config).items() if name not in said}


def check_can_be_compressed(checkpoint: Checkpoint) -> None:
    """Raise the `ValueError` of [`find_layers`], if it would raise one."""
    _empty_model(checkpoint)


def _empty_model(checkpoint: Checkpoint) -> PreTrainedModel:
    folder, config = checkpoint.folder, without_empty_formats(checkpoint.config)
    is_old = any(one.old for one in checkpoint.compressed.values())
    quantization = None if is_old else config.get("quantization_config") or config.get("compression_config")
    if names_format(config) or (checkpoint.compressed and not is_old):
        raise ValueError(f"the model in {folder} is compressed already")
    if quantization is not None:
        raise ValueError(f"the model in {folder} is quantized: only float32, bfloat16 and float16 can be compressed")
    if "model_type" not in config:
        raise ValueError(f"{folder} has no config.json that names a model_type: which layers are linear is not known")
    try:
        return empty_model(folder, config)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"Transformers {transformers.__version__} cannot build the model in {folder} (model_type "
            f"{config['model_type']!r}): {error}. {INSTEAD}"
        ) from error
