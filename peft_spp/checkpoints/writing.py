# SPDX-License-Identifier: Apache-2.0
"""Writing a safetensors file tensor by tensor, where `safetensors` wants all of them in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .file_bytes import read_bytes
from .output import write_file
from .safetensors_files import DTYPES, read_header
from .tensor_file import StoredTensor


PIECE_BYTES = 1 << 24

_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.uint8: "U8"}


@dataclass(frozen=True)
class NewTensor:
    """A tensor to write."""

    name: str
    dtype: torch.dtype | str  # its dtype, or the name that it has in files
    shape: tuple[int, ...]
    size: int  # its bytes
    pieces: Callable[[], Iterator[Tensor]]  # makes its bytes, each piece a vector of uint8


def computed(name: str, dtype: torch.dtype, shape: tuple[int, ...], make: Callable[[], Tensor]) -> NewTensor:
    """A tensor that is made when it is written."""

    def pieces() -> Iterator[Tensor]:
        yield make().contiguous().view(-1).view(torch.uint8)

    return NewTensor(name, dtype, shape, dtype.itemsize * math.prod(shape), pieces)


def copied(tensor: StoredTensor) -> NewTensor:
    """A tensor with the bytes that it has in another file."""

    def pieces() -> Iterator[Tensor]:
        for start in range(tensor.start, tensor.stop, PIECE_BYTES):
            yield read_bytes(tensor.file, start, min(start + PIECE_BYTES, tensor.stop))

    return NewTensor(tensor.name, tensor.dtype, tensor.shape, tensor.stop - tensor.start, pieces)


def write_tensors(
    path: Path, tensors: Sequence[NewTensor], metadata: Mapping[str, str], done: Callable[[int], object]
) -> None:
    """Write a new safetensors file, and read its header back."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for one in tensors:
        dtype = one.dtype if isinstance(one.dtype, str) else _NAMES[one.dtype]
        header[one.name] = {
            "dtype": dtype,
            "shape": list(one.shape),
            "data_offsets": [offset, offset + one.size],
        }
        offset += one.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def pieces() -> Iterator[Tensor]:
        yield torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8)
        for one in tensors:
            written = 0
            for piece in one.pieces():
                written += len(piece)
                yield piece
                done(len(piece))
            if written != one.size:
                raise ValueError(f"tensor {one.name!r} has {written} bytes, and {one.size} were expected")

    write_file(path, pieces())
    found = {one.key: one.shape for one in read_header(path)}
    if found != {one.name: one.shape for one in tensors}:
        raise ValueError(f"{path.name} does not hold the tensors that were written to it: the disk may be damaged")
