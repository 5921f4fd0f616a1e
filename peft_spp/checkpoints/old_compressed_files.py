# SPDX-License-Identifier: Apache-2.0
"""
The sparse formats that compressed-tensors had until it removed them (its pull request 610).

A weight is four tensors of its module: `compressed` with the values row by row, `bitmask` with a bit a place, the
lowest first and rows padded to bytes, `shape`, and in "sparse-bitmask" `row_offsets`, which are not read. In
"sparse-24-bitmask" the values are a matrix of half the columns. See `sparse_bitmask.py` and `sparse_24_bitmask.py` of
compressed-tensors 0.9 to 0.13. Up to 0.8.1 every tensor of a model is stored so, whatever its dimensions, and the four
are tensors of the parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..functional.bitmask import Compressed, bitmask_bytes
from ..functional.compressed import decompress
from .compressed_files import join, stored_size
from .file_bytes import byte_ranges, read_bytes
from .stored import Stored


FORMATS = ("sparse-bitmask", "sparse-24-bitmask")
CONFIG_KEYS = ("quantization_config", "compression_config", "sparsity_config")
"""Where a `config.json` describes how weights are stored."""

_VALUES, _BITMASK, _SHAPE, _OFFSETS = ".compressed", ".bitmask", ".shape", ".row_offsets"


class Parts(NamedTuple):
    """The tensors of one parameter, by their names."""

    values: str
    bitmask: str
    shape: str
    unread: tuple[str, ...]  # what is not read


def sparse_format(config: Mapping[str, Any]) -> str | None:
    """
    The format of a checkpoint, `None` if it is not a sparse one of compressed-tensors; an error if it cannot be read.
    """
    for key in CONFIG_KEYS:
        outer = config.get(key)
        if not isinstance(outer, Mapping):
            continue
        sparsity = outer if key == "sparsity_config" else outer.get("sparsity_config")
        if not isinstance(sparsity, Mapping) or sparsity.get("format") in (None, "dense"):
            continue
        name = sparsity["format"]
        if name not in FORMATS:
            raise ValueError(
                f"config.json: {key} has the sparsity format {name!r} of compressed-tensors, and only "
                f"{', '.join(FORMATS)} are read"
            )
        values = outer.get("format")
        if key != "sparsity_config" and (outer.get("config_groups") or values not in (None, "dense", name)):
            raise ValueError(
                f"config.json: {key} combines the sparsity format {name!r} with quantized values"
                f"{f' ({values})' if values else ''}, which is not read. Load the model with a version of "
                "compressed-tensors that still does (0.13 or older), and save it dense"
            )
        return str(name)
    return None


def without_empty_formats(config: Mapping[str, Any]) -> dict[str, Any]:
    """
    A configuration without what compressed-tensors wrote of sparse weights that it stored dense. It says nothing about
    how the tensors are stored, and engines that have dropped the sparse formats refuse the model for it.
    """
    return {key: value for key, value in config.items() if key not in CONFIG_KEYS or not _is_dense(key, value)}


def _is_dense(key: str, outer: Any) -> bool:
    if not isinstance(outer, Mapping):
        return False
    sparsity = outer if key == "sparsity_config" else outer.get("sparsity_config")
    if not isinstance(sparsity, Mapping) or outer.get("config_groups"):
        return False
    return all(one.get("format") in (None, "dense") for one in (outer, sparsity))


def find_parts(dtypes: Mapping[str, torch.dtype | str]) -> dict[str, Parts]:
    """
    The tensors of each parameter in these formats; an error if one is missing or of another dtype, or a parameter is
    there twice.
    """
    found: dict[str, Parts] = {}
    whole = names_parameters(dtypes)
    for name in dtypes:
        if not name.endswith(_VALUES):
            continue
        module = name.removesuffix(_VALUES)
        bitmask, shape = module + _BITMASK, module + _SHAPE
        for one in (bitmask, shape):
            if one not in dtypes:
                raise ValueError(f"tensor {name!r} is compressed, and {one!r} is not there")
        if not isinstance(dtypes[name], torch.dtype) or dtypes[bitmask] != "U8" or dtypes[shape] != "I64":
            raise ValueError(
                f"tensor {name!r} has dtype {dtypes[name]}, its bitmask {dtypes[bitmask]} and its shape "
                f"{dtypes[shape]}; they must be floating, U8 and I64"
            )
        offsets = module + _OFFSETS
        weight = module if whole or module.endswith(".bias") else f"{module}.weight"
        if weight in dtypes or weight in found:
            raise ValueError(f"{weight!r} is there twice: as {name!r}, and as {found.get(weight, (weight,))[0]!r}")
        found[weight] = Parts(name, bitmask, shape, (offsets,) if offsets in dtypes else ())
    return found


def names_parameters(names: Iterable[str]) -> bool:
    """Whether the tensors in these formats are named after parameters, as up to 0.8.1, and not after modules."""
    return any(name.endswith(f".weight{_VALUES}") for name in names)


def read_shape(file: Path, name: str, bitmask: tuple[int, ...]) -> tuple[int, ...]:
    """Read the shape of a weight; an error if its bitmask does not have the shape that belongs to it."""
    start, stop = byte_ranges(file)[name]
    right_size = stop - start == 8 * len(bitmask)
    shape = tuple(read_bytes(file, start, stop).view(torch.int64).tolist()) if right_size else ()
    if not shape or min(shape) < 1 or bitmask != _bitmask_shape(shape):
        raise ValueError(
            f"tensor {name!r} of {file} must be the shape of a weight, as int64, whose bitmask has shape {bitmask}, "
            f"and is {list(shape)}"
        )
    return shape


def join_parts(name: str, values: Tensor, bitmask: Tensor, shape: tuple[int, ...]) -> Compressed:
    """Make a compressed weight of what was read from files, checked to fit together; `name` is for the error."""
    if not shape or tuple(bitmask.shape) != _bitmask_shape(shape):
        raise ValueError(f"{name}: a bitmask of shape {tuple(bitmask.shape)} does not fit a weight of shape {shape}")
    padded = torch.nn.functional.pad(bitmask, (0, bitmask_bytes(shape[-1]) - bitmask.shape[-1]))
    return join(name, values.flatten(), padded, shape)


def _bitmask_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-1], -(-shape[-1] // 8))


def with_old_weights(listed: Mapping[Path, list[Stored]]) -> list[Stored]:
    """List the tensors of a checkpoint in these formats as if it were dense."""
    tensors = {one.key: (file, one) for file, stored in listed.items() for one in stored}
    for name, parts in find_parts({one: stored.dtype for one, (_, stored) in tensors.items()}).items():
        (_, values), (file, bitmask), (shape_file, _) = (tensors.pop(one) for one in parts[:3])
        for one in parts.unread:
            del tensors[one]
        shape = read_shape(shape_file, parts.shape, bitmask.shape)
        load = partial(_load, name, file, bitmask, values, shape)
        tensors[name] = (file, Stored(name, shape, values.dtype, load, size=stored_size(values, bitmask)))
    return [one for _, one in tensors.values()]


def _load(name: str, file: Path, bitmask: Stored, values: Stored, shape: tuple[int, ...]) -> Tensor:
    bits = read_bytes(file, *byte_ranges(file)[bitmask.key]).view(bitmask.shape)
    return decompress(join_parts(name, values.load(), bits, shape))
