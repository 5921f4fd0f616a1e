# SPDX-License-Identifier: Apache-2.0
"""Weights of a checkpoint that are stored without their zeros."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..functional.bitmask import Compressed, unpack_bits
from ..functional.compressed import decompress
from .compressed_files import bitmask_of, compressed_shapes, is_bitmask, join
from .file_bytes import read_bytes
from .old_compressed_files import find_parts, join_parts, read_shape
from .tensor_file import StoredTensor


@dataclass(frozen=True)
class CompressedTensor:
    """A weight whose values and bitmask are two tensors of a checkpoint, in one file or in two."""

    values: StoredTensor
    bitmask: StoredTensor
    shape: tuple[int, ...]  # the shape of the weight
    name: str
    old: bool = False  # whether it is in a format that compressed-tensors had
    unread: tuple[str, ...] = ()  # the names of other tensors that belong to it

    @property
    def file(self) -> Path:
        return self.values.file

    @property
    def dtype(self) -> torch.dtype | str:
        return self.values.dtype

    def load_compressed(self) -> Compressed:
        """Read the weight as it is stored; a `ValueError` if values and bitmask do not fit each other."""
        bits = _read_bits(self.bitmask)
        return (join_parts if self.old else join)(self.name, self.values.load(), bits, self.shape)

    def load(self) -> Tensor:
        """Read the dense weight."""
        return decompress(self.load_compressed())

    def matrices(self) -> list[CompressedTensor]:
        """The matrices of a stack, one by one; a `ValueError` if values and bitmask do not fit each other."""
        found, start = [], 0
        for bitmask in self.bitmask.matrices():
            stop = start + int(unpack_bits(_read_bits(bitmask), self.shape[-1]).count_nonzero())
            found.append(replace(self, values=self.values.rows(start, stop), bitmask=bitmask, shape=self.shape[1:]))
            start = stop
        if (start,) != self.values.shape:
            raise ValueError(
                f"tensor {self.name!r} of {self.file} has {self.values.shape[0]} values, and its bitmask has places "
                f"for {start}: the file is damaged. Copy or download it again"
            )
        return found

    def describe(self) -> str:
        """The dtype and the shape, for messages."""
        return f"{str(self.dtype).removeprefix('torch.')} {self.shape}, compressed"


def _read_bits(bitmask: StoredTensor) -> Tensor:
    return read_bytes(bitmask.file, bitmask.start, bitmask.stop).view(bitmask.shape)


def find_compressed(
    tensors: Mapping[str, StoredTensor], files: Iterable[Path], *, is_old: bool = False
) -> dict[str, CompressedTensor]:
    """Find the compressed weights of a checkpoint, which may be in a format that compressed-tensors had."""
    if is_old:
        found = {}
        for name, parts in find_parts({one: tensor.dtype for one, tensor in tensors.items()}).items():
            values, bitmask = tensors[parts.values], tensors[parts.bitmask]
            shape = read_shape(tensors[parts.shape].file, parts.shape, bitmask.shape)
            found[name] = CompressedTensor(values, bitmask, shape, name, True, (parts.shape, *parts.unread))
        return found
    if not any(is_bitmask(name) for name in tensors):
        return {}
    shapes = compressed_shapes(
        {name: one.shape for name, one in tensors.items()},
        {name: one.dtype for name, one in tensors.items()},
        files,
    )
    return {
        name: CompressedTensor(tensors[name], tensors[bitmask_of(name)], shape, name) for name, shape in shapes.items()
    }
