# SPDX-License-Identifier: Apache-2.0
"""Where the tensors of a safetensors file lie in it, and reading them without mapping the file into memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .file_bytes import byte_ranges
from .safetensors_files import load_tensor, read_header
from .stored import Stored


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file."""

    file: Path
    name: str  # its name in the file
    dtype: torch.dtype | str  # its dtype, or the file's name of one that is not floating
    shape: tuple[int, ...]
    start: int  # where its bytes start in the file
    stop: int  # where they end

    def load(self) -> Tensor:
        return load_tensor(self.file, self.name, self.dtype, self.shape, (self.start, self.stop))

    def rows(self, first: int, last: int) -> StoredTensor:
        """Some rows of the tensor, as a tensor."""
        row_bytes = (self.stop - self.start) // max(self.shape[0], 1)
        start, stop = (self.start + row * row_bytes for row in (first, last))
        return replace(self, shape=(last - first, *self.shape[1:]), start=start, stop=stop)

    def matrices(self) -> list[StoredTensor]:
        """The matrices of a stack, one by one."""
        parts = (self.rows(index, index + 1) for index in range(self.shape[0]))
        return [replace(one, shape=one.shape[1:]) for one in parts]

    def describe(self) -> str:
        """The dtype and the shape, for messages."""
        return f"{str(self.dtype).removeprefix('torch.')} {self.shape}"


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file that `safetensors` itself has accepted."""

    path: Path  # the file
    size: int  # its size in bytes
    tensors: dict[str, StoredTensor]  # what it holds, in the order of the bytes


def open_tensor_file(path: Path, listed: Sequence[Stored] | None = None) -> TensorFile:
    """Read the header of a safetensors file."""
    # `safetensors` checks the header; what is parsed again below are the offsets, which it does not tell
    checked = read_header(path) if listed is None else listed
    ranges = byte_ranges(path)
    found = []
    for one in checked:
        name = one.key
        start, stop = ranges[name]
        if isinstance(one.dtype, torch.dtype) and one.dtype.itemsize * math.prod(one.shape) != stop - start:
            raise ValueError(f"{path} is not a readable safetensors file: tensor {name!r} does not fit into it")
        found.append(StoredTensor(path, name, one.dtype, one.shape, start, stop))
    return TensorFile(
        path, path.stat().st_size, {one.name: one for one in sorted(found, key=lambda one: (one.start, one.stop))}
    )
