# SPDX-License-Identifier: Apache-2.0
"""The tensors of a safetensors file, or of a folder of them, read one at a time."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from torch import Tensor

from .compressed_files import with_dense_weights
from .compressed_format import check_config
from .file_bytes import byte_ranges, open_safetensors, read_bytes
from .instead import instead_of_model
from .old_compressed_files import sparse_format, with_old_weights
from .stored import Stored


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

OTHER_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    **{f"U{bits}": getattr(torch, f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)},
    "C64": torch.complex64,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""Dtypes that hold no weights, but that a model may load. Those of 4 and 6 bits are only copied."""

INDEX_SUFFIX = ".safetensors.index.json"

_PICKLED_MODEL = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def stored_in_files(path: str | os.PathLike[str]) -> tuple[str, Iterator[Stored], Mapping[str, Any]]:
    """
    List the tensors of a safetensors file or folder; only the headers are read.

    A folder is read as Transformers loads it: the file that `transformers_weights` of `config.json` names, else
    `model.safetensors`, else all that the shards hold which `model.safetensors.index.json` names, whether or not it
    lists the tensor. A folder that Transformers does not load is read as well: every `*.safetensors` in it but an
    adapter's. Compressed weights are listed in their dense shape.

    It returns the path, its tensors, and the model's configuration.
    """
    path = Path(path)
    if path.is_dir():
        folder, listing = path, list_folder(path).files
    elif path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"only safetensors is read, and {path} is not a .safetensors file; {_FIX}")
        if path.name == SAFETENSORS_WEIGHTS_NAME:
            raise ValueError(f"{path} holds no model{instead_of_model(path.parent)}")
        folder, listing = path.parent, {path: None}
    else:
        raise FileNotFoundError(f"there is no file or folder {path} (models are not downloaded: give a local path)")
    config = read_config(folder)
    headers = read_headers(listing)
    stored = with_old_weights(headers) if sparse_format(config) else with_dense_weights(headers)
    return str(path), iter(sorted(stored, key=_by_number)), config


def _by_number(one: Stored) -> list[tuple[int, str]]:
    """Sorts layer 10 after layer 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in one.key.split(".")]


_FIX = "load the model and write it again with save_pretrained(folder), which writes safetensors"


@dataclass(frozen=True)
class Listing:
    """The weight files of a folder."""

    files: dict[Path, list[str] | None]  # each with the names that the index expects in it, or `None`
    index: Path | None = None  # the index that names them
    loaded: bool = True  # whether Transformers loads them


def list_folder(folder: Path) -> Listing:
    """List the safetensors files of a checkpoint; see [`stored_in_files`]."""
    named = read_config(folder).get("transformers_weights")
    if named is not None:
        file = _inside(folder / "config.json", named)
        return Listing(_list_index(file), file) if named.endswith(INDEX_SUFFIX) else Listing({file: None})
    if (folder / SINGLE).is_file():
        return Listing({folder / SINGLE: None})
    if (folder / INDEX).is_file():
        return Listing(_list_index(folder / INDEX), folder / INDEX)
    if pickled := next((name for name in _PICKLED_MODEL if (folder / name).is_file()), None):
        raise ValueError(f"only safetensors is read, and Transformers loads {pickled} from folder {folder}; {_FIX}")
    files = [file for file in sorted(folder.glob("*.safetensors")) if file.name != SAFETENSORS_WEIGHTS_NAME]
    if not files:
        raise ValueError(f"folder {folder} holds no model in safetensors{instead_of_model(folder)}")
    return Listing(dict.fromkeys(files), loaded=False)


def read_config(folder: Path) -> dict[str, Any]:
    """Read the configuration of a model, and check that the format of its weights is one that is known here."""
    file = folder / "config.json"
    config = read_json(file) if file.is_file() else {}
    try:
        check_config(config)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return config


def _list_index(index: Path) -> dict[Path, list[str] | None]:
    weight_map = read_json(index, strict=True).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{index} has no weight_map of tensor names to file names")
    names: dict[Path, list[str] | None] = {}
    for name, shard in weight_map.items():
        file = index.parent / shard
        if file not in names:
            names[_inside(index, shard)] = []
        wanted = names[file]
        assert wanted is not None
        wanted.append(name)
    return names


def _inside(source: Path, named: Any) -> Path:
    """The file next to `source` that it names."""
    if not isinstance(named, str) or not named.endswith((".safetensors", INDEX_SUFFIX)):
        raise ValueError(f"{source} names {named!r} as a weight file, which is not a .safetensors file; {_FIX}")
    # By its text alone: in a download cache the files are links that lead out of the folder, as they should.
    if re.match(r"[/\\]|[A-Za-z]:", named) or ".." in re.split(r"[/\\]", named):
        raise ValueError(f"{source} names {named!r}, which lies outside its folder")
    file = source.parent / named
    if not os.path.isfile(file):  # unlike the method it is false for a name that no file can have
        raise ValueError(f"{source} names {named!r}, which is not there")
    return file


def read_json(file: Path, strict: bool = False) -> dict[str, Any]:
    more: dict[str, Any] = {"parse_constant": _no_constant, "object_pairs_hook": _without_duplicates} if strict else {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"), **more)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}. It may be damaged; copy it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object. It may be damaged; copy it again")
    return content


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not valid JSON")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} is there twice")
    return content


def read_headers(files: Mapping[Path, list[str] | None]) -> dict[Path, list[Stored]]:
    """List the tensors of several safetensors files that make up one checkpoint."""
    seen: dict[str, Path] = {}
    found = {}
    for file, expected in files.items():
        found[file] = read_header(file, expected)
        for one in found[file]:
            if one.key in seen:
                raise ValueError(f"tensor {one.key!r} is in both {seen[one.key]} and {file}")
            seen[one.key] = file
    return found


def read_header(file: Path, expected: Iterable[str] | None = None) -> list[Stored]:
    """List the tensors of one safetensors file."""
    listed = []
    try:
        with open_safetensors(file) as tensors:
            present = set(tensors.keys())
            missing = [name for name in expected or () if name not in present]
            if missing:
                raise ValueError(f"{file} does not hold tensor {missing[0]!r}, which the index says it does")
            ranges = byte_ranges(file)
            for name in sorted(present):
                view = tensors.get_slice(name)
                dtype = DTYPES.get(view.get_dtype(), view.get_dtype())
                shape = checked_shape(file, name, view.get_shape())
                listed.append(Stored(name, shape, dtype, partial(load_tensor, file, name, dtype, shape, ranges[name])))
    except SafetensorError as error:
        raise ValueError(f"{file} is not a readable safetensors file (truncated or damaged): {error}") from error
    return listed


def checked_shape(file: Path, name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """
    Check a shape from a header: next to a 0, `safetensors` lets sizes pass that PyTorch cannot count to. It returns
    the shape.
    """
    if math.prod(size for size in shape if size) >= 2**63:
        raise ValueError(f"{file} is damaged: tensor {name!r} has the shape {tuple(shape)}. Copy the file again")
    return tuple(shape)


def load_tensor(
    file: Path, name: str, dtype: torch.dtype | str, shape: Sequence[int], byte_range: tuple[int, int]
) -> Tensor:
    """Read one tensor of a file."""
    found = OTHER_DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None:
        raise ValueError(f"tensor {name!r} of {file} has dtype {dtype}, which PyTorch has no values for")
    return read_bytes(file, *byte_range).view(found).view(tuple(shape))
