# SPDX-License-Identifier: Apache-2.0
"""Where the tensors of a safetensors file lie in it, and reading their bytes.

`safetensors` parses the whole header each time it opens a file, and keeps what it has read mapped for as long as the
file is open. Reading thousands of tensors one at a time takes neither here.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor


def open_safetensors(path: Path) -> safe_open:
    """Open a safetensors file. `safetensors` itself reports one that may not be read as missing."""
    with path.open("rb"):
        pass
    return safe_open(path, framework="pt")


def byte_ranges(path: Path) -> dict[str, tuple[int, int]]:
    """Read where the tensors of a safetensors file start and end."""
    size = path.stat().st_size
    with path.open("rb") as file:
        data_start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(data_start - 8))
    ranges = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, stop = (data_start + offset for offset in entry["data_offsets"])
        if not data_start <= start <= stop <= size:
            raise ValueError(f"{path} is not a readable safetensors file: tensor {name!r} does not fit into it")
        ranges[name] = (start, stop)
    return ranges


def read_bytes(path: Path, start: int, stop: int) -> Tensor:
    """Read a range of a file."""
    buffer = torch.empty(stop - start, dtype=torch.uint8)
    view = buffer.numpy().data
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        done = 0
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                raise ValueError(f"{path} has become shorter while it was read")
            done += count
    return buffer
