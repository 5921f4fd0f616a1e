# SPDX-License-Identifier: Apache-2.0
"""Which tensors of a checkpoint are weights of linear layers that can be compressed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.compressed_tensor import CompressedTensor
from ..checkpoints.empty_model import empty_model
from ..checkpoints.old_compressed_files import CONFIG_KEYS
from ..checkpoints.tensor_file import StoredTensor
from ..functional.bitmask import BITS
from .config import METHOD
from .selection import find_linear_layers


INSTEAD = "Load the model with from_pretrained and quantization_config=BitmaskConfig(), and save it instead."


def find_layers(
    checkpoint: Checkpoint, skip: Sequence[str] | None = None
) -> tuple[dict[str, StoredTensor | CompressedTensor], dict[str, str]]:
    """
    The weights that can be compressed, by the layer's name in the model, and for each other linear layer why not.
    """
    model = _empty_model(checkpoint)
    layers, kept = find_linear_layers(model, skip)
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    state = model.state_dict()
    found: dict[str, StoredTensor | CompressedTensor] = {}
    for name, tensor in checkpoint.dense.items():
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        module = renamed.removesuffix(".weight")
        if pattern is None and module in layers and renamed != module and tensor.shape == tuple(state[renamed].shape):
            if tensor.dtype in BITS:
                found[module] = tensor
            else:
                kept[module] = f"its weight is {str(tensor.dtype).removeprefix('torch.')}"
    kept |= {name: "stored in another form" for name in layers if name not in found and name not in kept}
    # in the order of the model
    return {name: found[name] for name in layers if name in found}, kept


def plain_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The configuration of a checkpoint without what it says of compression."""
    said = CONFIG_KEYS if checkpoint.compressed else ()
    return {name: value for name, value in checkpoint.config.items() if name not in said}


def _empty_model(checkpoint: Checkpoint) -> PreTrainedModel:
    folder, config = checkpoint.folder, checkpoint.config
    is_old = any(one.old for one in checkpoint.compressed.values())
    quantization = None if is_old else config.get("quantization_config") or config.get("compression_config")
    if (isinstance(quantization, dict) and quantization.get("quant_method") == METHOD) or (
        checkpoint.compressed and not is_old
    ):
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
