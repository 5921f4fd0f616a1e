# SPDX-License-Identifier: Apache-2.0
"""The tensors of a safetensors file, or of a folder of them, read one at a time."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .file_bytes import byte_ranges, read_bytes
from .weights import Stored


SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
}
"""The floating dtypes by their names in a file."""

_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


def stored_in_files(path: str | os.PathLike[str]) -> tuple[str, Iterator[Stored], Mapping[str, Any]]:
    """List the tensors of a safetensors file or folder; only the headers are read.

    In a folder, `model.safetensors` is read if there is one, else the shards that `model.safetensors.index.json`
    names, else every `*.safetensors` in it. `config.json` beside them tells the `model_type`.

    Args:
        path (`str` or `os.PathLike`): The file or folder.

    Returns:
        `tuple[str, Iterator[Stored], Mapping[str, Any]]`: The path, its tensors, and the model's configuration.

    Raises:
        FileNotFoundError: If there is nothing at `path`.
        ValueError: If there is no safetensors file, or one is corrupt, missing, or outside the folder.
    """
    path = Path(path)
    if path.is_dir():
        folder, listing = path, list_folder(path)
    elif path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"only safetensors is read, and {path} is not a .safetensors file; {_FIX}")
        folder, listing = path.parent, {path: None}
    else:
        raise FileNotFoundError(f"there is no file or folder {path} (models are not downloaded: give a local path)")
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    return str(path), iter(sorted(_walk(listing), key=_by_number)), config


def _by_number(one: Stored) -> list[tuple[int, str]]:
    """Sorts layer 10 after layer 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in one.key.split(".")]


_FIX = "load the model and write it again with save_pretrained(folder), which writes safetensors"


def list_folder(folder: Path) -> dict[Path, list[str] | None]:
    """List the safetensors files of a checkpoint; see [`stored_in_files`].

    Args:
        folder (`Path`): The folder of the checkpoint.

    Returns:
        `dict[Path, list[str] | None]`: The files to read, each with the names to read from it (`None` for all).

    Raises:
        ValueError: If there is none, or the index is damaged, or names a file that is missing or outside the folder.
    """
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: None}
    if (folder / INDEX).is_file():
        return _list_index(folder / INDEX)
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return dict.fromkeys(files)
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLED)
    if pickled:
        raise ValueError(f"only safetensors is read, and folder {folder} holds {pickled[0]} and none; {_FIX}")
    raise ValueError(f"folder {folder} holds no .safetensors file")


def _list_index(index: Path) -> dict[Path, list[str] | None]:
    weight_map = read_json(index, strict=True).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{index} has no weight_map of tensor names to file names")
    names: dict[Path, list[str] | None] = {}
    for shard in dict.fromkeys(weight_map.values()):
        # By its text alone: in a download cache the files are links that lead out of the folder, as they should.
        if re.match(r"[/\\]|[A-Za-z]:", shard) or ".." in re.split(r"[/\\]", shard):
            raise ValueError(f"{index} names {shard!r}, which lies outside its folder")
        file = index.parent / shard
        if not os.path.isfile(file):  # unlike the method it is false for a name that no file can have
            raise ValueError(f"{index} names {shard!r}, which is not there")
        names[file] = [name for name, where in weight_map.items() if where == shard]
    return names


def read_json(file: Path, strict: bool = False) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        file (`Path`): The file.
        strict (`bool`, *optional*, defaults to `False`):
            Whether to refuse what Python reads and JSON does not have: NaN, infinity, and keys that are there twice.

    Returns:
        `dict[str, Any]`: Its content.

    Raises:
        ValueError: If it is not valid JSON, or not an object.
    """
    more: dict[str, Any] = {"parse_constant": _no_constant, "object_pairs_hook": _without_duplicates} if strict else {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"), **more)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}. It may be damaged; copy it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object. It may be damaged; copy it again")
    return content


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} is there twice")
    return content


def _walk(listing: Mapping[Path, list[str] | None]) -> Iterator[Stored]:
    seen: dict[str, Path] = {}
    for file, wanted in listing.items():
        for one in read_header(file, wanted):
            if one.key in seen:
                raise ValueError(f"tensor {one.key!r} is in both {seen[one.key]} and {file}")
            seen[one.key] = file
            yield one


def read_header(file: Path, wanted: list[str] | None = None) -> list[Stored]:
    """List the tensors of one safetensors file.

    Args:
        file (`Path`): The file.
        wanted (`list[str]`, *optional*): The names to list; by default all, sorted.

    Returns:
        `list[Stored]`: The tensors, not yet read.

    Raises:
        ValueError: If the file is damaged or does not hold a wanted tensor.
    """
    listed = []
    try:
        with safe_open(file, framework="pt") as tensors:
            present = set(tensors.keys())
            missing = [name for name in wanted or () if name not in present]
            if missing:
                raise ValueError(f"{file} does not hold tensor {missing[0]!r}, which the index says it does")
            ranges = byte_ranges(file)
            for name in sorted(present) if wanted is None else wanted:
                view = tensors.get_slice(name)
                dtype = DTYPES.get(view.get_dtype(), view.get_dtype())
                shape = checked_shape(file, name, view.get_shape())
                listed.append(Stored(name, shape, dtype, partial(_load, file, name, dtype, shape, ranges[name])))
    except SafetensorError as error:
        raise ValueError(f"{file} is not a readable safetensors file (cut short or damaged): {error}") from error
    return listed


def checked_shape(file: Path, name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Check a shape from a header: beside a 0, `safetensors` lets sizes pass that PyTorch cannot count to.

    Args:
        file (`Path`): The file, for the message.
        name (`str`): The name of the tensor, for the message.
        shape (`Sequence[int]`): The shape.

    Returns:
        `tuple[int, ...]`: The shape.

    Raises:
        ValueError: If a tensor cannot have it.
    """
    if math.prod(size for size in shape if size) >= 2**63:
        raise ValueError(f"{file} is damaged: tensor {name!r} has the shape {tuple(shape)}. Copy the file again")
    return tuple(shape)


def _load(
    file: Path, name: str, dtype: torch.dtype | str, shape: tuple[int, ...], byte_range: tuple[int, int]
) -> Tensor:
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"tensor {name!r} of {file} has dtype {dtype}, which is not floating")
    return read_bytes(file, *byte_range).view(dtype).view(shape)
