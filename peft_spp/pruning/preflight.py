# SPDX-License-Identifier: Apache-2.0
"""What pruning a checkpoint checks before it starts, in a dry run as in a run: all that would end it later."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import torch

from ..checkpoints.stored import count_non_finite
from ..checkpoints.tensor_file import StoredTensor
from .by_block import layers_of_block
from .calibration_data import CalibrationInputs
from .experts import Expert
from .layers import PrunableLayer, weight_name
from .methods import PruningMethod
from .skeleton import INSTEAD, Skeleton


def last_block(skeleton: Skeleton, layers: dict[str, PrunableLayer]) -> int:
    """The number of the last block that has a layer to prune: the calibration data go no further."""
    indices = range(len(skeleton.blocks))
    return max(index for index in indices if layers_of_block(layers, skeleton.blocks_name, index))


def needed_tensors(skeleton: Skeleton, layers: dict[str, PrunableLayer], method: PruningMethod) -> list[StoredTensor]:
    """Find the tensors that pruning will load, besides the weights to prune."""
    if method.statistics is None:
        return []
    found: dict[str, StoredTensor] = {}
    pruned = _pruned_whole(layers)
    for name in _names(skeleton, last_block(skeleton, layers)):
        if name in pruned or not skeleton.is_stored(name):
            continue
        found |= {stored.name: stored for stored in skeleton.origin(skeleton.stored_name(name)).tensors}
    return list(found.values())


def _pruned_whole(layers: dict[str, PrunableLayer]) -> set[str]:
    """The parameters that are pruned, all experts of them."""
    counts = Counter(weight_name(name, layer) for name, layer in layers.items())
    return {
        parameter
        for name, layer in layers.items()
        if counts[parameter := weight_name(name, layer)] == (len(layer.stack) if isinstance(layer, Expert) else 1)
    }


def check_in_one_block(skeleton: Skeleton, layers: dict[str, PrunableLayer]) -> None:
    """Raise a `ValueError` that names the first layer which is stored in one tensor with a part of another block."""
    for index in range(last_block(skeleton, layers) + 1):
        inside = set(skeleton.names_of_block(index))
        for name, layer in layers_of_block(layers, skeleton.blocks_name, index).items():
            others = skeleton.origin(weight_name(name, layer)).shapes.keys() - inside
            if others:
                raise ValueError(
                    f"{skeleton.checkpoint.folder} stores {name} and {min(others)} in one tensor, and block {index} "
                    f"has only one of them. {INSTEAD}"
                )


def _names(skeleton: Skeleton, last: int) -> Iterator[str]:
    yield from skeleton.names_of_stem()
    for index in range(last + 1):
        yield from skeleton.names_of_block(index)


def check_finite(tensor: StoredTensor) -> None:
    """Raise a `ValueError` that names a tensor with a value that is not finite."""
    broken = count_non_finite(tensor.load())
    if broken:
        raise ValueError(
            f"tensor {tensor.name!r} of {tensor.file} contains {broken} NaN or infinite values: the model is broken"
        )


def check_tokens(skeleton: Skeleton, data: Iterable[CalibrationInputs]) -> None:
    """Check that the model has an embedding for each token of the calibration data."""
    embeddings = skeleton.model.get_input_embeddings()
    weight = getattr(embeddings, "weight", None)
    if weight is None:
        return
    for inputs in data:
        ids = inputs.arguments.get("input_ids")
        if not isinstance(ids, torch.Tensor) or not ids.numel():
            continue
        smallest, largest = int(ids.min()), int(ids.max())
        if smallest < 0:
            raise ValueError(f"the calibration data contains token {smallest}: ids of tokens start at 0")
        if largest >= len(weight):
            raise ValueError(
                f"the calibration data contains token {largest}, but the model has embeddings for only {len(weight)} "
                "tokens: the tokenizer does not belong to the model, or was extended without resize_token_embeddings"
            )
