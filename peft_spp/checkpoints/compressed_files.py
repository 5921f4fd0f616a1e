# SPDX-License-Identifier: Apache-2.0
"""
Compressed weights in safetensors files: `<module>.weight` holds the values and `<module>.bitmask` their places. Those
of a parameter of another name, `<module>.<name>`, are in `<module>.<name>_bitmask`.

How many columns a weight has neither of them tells, since rows of the bitmask are padded. The model knows, and for
those who read the files alone the header says it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..functional.bitmask import Compressed, check_compressed
from ..functional.compressed import decompress
from .file_bytes import byte_ranges, open_safetensors, read_bytes
from .stored import Stored


COLUMNS = "bitmask_columns"
"""The entry of a header's metadata with the number of columns of each compressed weight, by its name, as JSON."""


def columns_text(columns: Mapping[str, int]) -> str:
    """The entry of a header."""
    return json.dumps(dict(sorted(columns.items())), separators=(",", ":"))


def read_metadata(file: Path) -> dict[str, str]:
    try:
        with open_safetensors(file) as tensors:
            return dict(tensors.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{file} is not a readable safetensors file (truncated or damaged): {error}") from error


def read_columns(files: Iterable[Path]) -> dict[str, int]:
    """Read how many columns the compressed weights of a checkpoint have."""
    found: dict[str, int] = {}
    for file in files:
        text = read_metadata(file).get(COLUMNS)
        if text is None:
            continue
        try:
            listed = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}: {COLUMNS} in its header is not valid JSON: {error}. Copy it again") from error
        if not isinstance(listed, dict) or not all(type(n) is int and 0 < n < 1 << 40 for n in listed.values()):
            # with no column, a file of a few bytes may have as many rows as it says
            raise ValueError(f"{file}: {COLUMNS} in its header must be names and numbers of columns. Copy it again")
        found |= listed
    return found


def compressed_shapes(
    shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype | str], files: Iterable[Path]
) -> dict[str, tuple[int, ...]]:
    """Find the compressed weights of a checkpoint."""
    pairs = {
        name: bitmask_of(name) for name, shape in shapes.items() if len(shape) == 1 and bitmask_of(name) in shapes
    }
    columns = read_columns(files)
    for name, bitmask in pairs.items():
        if name not in columns:
            raise ValueError(
                f"tensor {name!r} is compressed, and no header of its files says how many columns it has: load the "
                "model with Transformers and peft_spp, and save it again"
            )
        if not isinstance(dtypes[name], torch.dtype):
            raise ValueError(f"tensor {name!r} is compressed, and has dtype {dtypes[name]}: no weight")
        if len(shapes[bitmask]) < 2 or dtypes[bitmask] != "U8":
            raise ValueError(f"tensor {bitmask!r} has shape {shapes[bitmask]} and dtype {dtypes[bitmask]}: no bitmask")
    for name in columns:
        if name not in pairs and (name in shapes or bitmask_of(name) in shapes):
            raise ValueError(f"{name!r} is compressed, and not both its values and its bitmask are there")
    found = {name: (*shapes[bitmask][:-1], columns[name]) for name, bitmask in pairs.items()}
    for name, shape in found.items():
        if math.prod(size for size in shape if size) >= 2**63:
            raise ValueError(f"{name!r} is compressed, and would have the shape {shape}. Copy its file again")
    return found


def bitmask_of(name: str) -> str:
    module, dot, last = name.rpartition(".")
    return f"{module}{dot}{'bitmask' if last == 'weight' else f'{last}_bitmask'}"


def is_bitmask(name: str) -> bool:
    """Whether a tensor may be the bitmask of a weight, by its name."""
    return name.endswith((".bitmask", "_bitmask"))


def with_dense_weights(listed: Mapping[Path, list[Stored]]) -> list[Stored]:
    """List the tensors of a checkpoint as if nothing were compressed in it."""
    tensors = {one.key: one for stored in listed.values() for one in stored}
    if not any(is_bitmask(name) for name in tensors):
        return list(tensors.values())
    file_of = {one.key: file for file, stored in listed.items() for one in stored}
    shapes = compressed_shapes(
        {name: one.shape for name, one in tensors.items()}, {name: one.dtype for name, one in tensors.items()}, listed
    )
    for name, shape in shapes.items():
        values, bitmask = tensors[name], tensors.pop(bitmask_of(name))
        load = partial(_load, name, file_of[bitmask.key], bitmask, values, shape)
        tensors[name] = Stored(name, shape, values.dtype, load, size=stored_size(values, bitmask))
    return list(tensors.values())


def stored_size(values: Stored, bitmask: Stored) -> int:
    """The bytes of a weight that is stored without its zeros."""
    return math.prod(values.shape) * cast(torch.dtype, values.dtype).itemsize + math.prod(bitmask.shape)


def join(name: str, values: Tensor, bitmask: Tensor, shape: tuple[int, ...]) -> Compressed:
    """Make a compressed weight of what was read from files."""
    return Compressed(values, bitmask, check_compressed(values, bitmask, shape, name), shape[-1])


def _load(name: str, file: Path, bitmask: Stored, values: Stored, shape: tuple[int, ...]) -> Tensor:
    bits = read_bytes(file, *byte_ranges(file)[bitmask.key]).view(bitmask.shape)
    return decompress(join(name, values.load(), bits, shape))
