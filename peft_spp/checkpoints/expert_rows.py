# SPDX-License-Identifier: Apache-2.0
"""Where the rows of each expert of a stack are in a checkpoint, which may have a tensor for each expert."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter

from .compressed_tensor import CompressedTensor
from .conversion import Origin
from .tensor_file import StoredTensor


@dataclass(frozen=True)
class ExpertRows:
    """A stored matrix that holds one of the experts in a stack, or some of its rows.

    Args:
        matrix (`StoredTensor` or `CompressedTensor`): The matrix; a part of a tensor if that holds all experts.
        expert (`int`): Which expert it is of.
        first (`int`): The first of its rows that the matrix holds.
        flipped (`bool`): Whether the checkpoint has inputs and outputs the other way round than the model.
    """

    matrix: StoredTensor | CompressedTensor
    expert: int
    first: int = 0
    flipped: bool = False


def expert_rows(origin: Origin, name: str) -> list[ExpertRows] | None:
    """
    Find the matrices that a stack of weights consists of, expert by expert.

    Args:
        origin (`Origin`): Where the checkpoint has the stack.
        name (`str`): The name of the stack, a parameter of two or three dimensions. One of two is a single expert.

    Returns:
        `list[ExpertRows]`, *optional*: In the order of the rows; `None` if the stack is made in another way than by
        putting experts, and parts of experts, one below another.
    """
    shape = origin.shapes[name]
    flipped = _flips(origin.converter, origin.tensors[0].shape, shape)
    if flipped is not None:
        tensor = origin.tensors[0]
        if len(shape) == 2:
            return [ExpertRows(tensor, 0, flipped=flipped)]
        return [ExpertRows(one, index, flipped=flipped) for index, one in enumerate(tensor.matrices())]
    if origin.converter is None or not puts_below(origin.converter):
        return None
    parts = [[one.tensor for one in origin.parts if one.pattern == pattern] for pattern in _patterns(origin)]
    if any(len(part) != shape[0] for part in parts):
        return None
    return [rows for index in range(shape[0]) for rows in _below([part[index] for part in parts], index)]


def _flips(converter: WeightConverter | None, stored: tuple[int, ...], shape: tuple[int, ...]) -> bool | None:
    """Whether a converter exchanges inputs and outputs, which may depend on the shape; `None` if it does more."""
    if converter is None:
        return False
    if [type(one) for one in converter.operations] != [Transpose]:
        return None
    only = cast(Transpose, converter.operations[0])
    if {only.dim0, only.dim1} != {len(shape) - 2, len(shape) - 1}:
        return None
    return not only.check_dims or stored != shape


def puts_below(converter: WeightConverter) -> bool:
    """Whether a converter puts the matrices of each expert one below another, and makes a stack of the experts."""
    made_by = [(type(one), getattr(one, "dim", None)) for one in converter.operations]
    return made_by in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])


def _patterns(origin: Origin) -> list[str]:
    assert origin.converter is not None
    found = {one.pattern for one in origin.parts}
    return [pattern for pattern in origin.converter.source_patterns if pattern in found]


def _below(matrices: list[StoredTensor], index: int) -> Iterator[ExpertRows]:
    first = 0
    for matrix in matrices:
        yield ExpertRows(matrix, index, first)
        first += matrix.shape[0]
