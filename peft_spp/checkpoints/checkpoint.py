# SPDX-License-Identifier: Apache-2.0
"""A checkpoint in a local folder: its weight files, and the files that belong to the model next to them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .compressed_tensor import CompressedTensor, find_compressed
from .layout import Layout
from .old_compressed_files import sparse_format
from .own_files import CARD
from .safetensors_files import INDEX, SINGLE, list_folder, read_config, read_headers
from .tensor_file import StoredTensor, TensorFile, open_tensor_file


OTHER_WEIGHTS = (
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.gguf",
    "*.onnx",
    "*.onnx_data",
    "*.onnx.data",
    "*.h5",
    "*.msgpack",
    "*.tflite",
    "*.ot",
    "*.bin.index.json",
    "*.h5.index.json",
    "*.msgpack.index.json",
)
"""Weights in formats that are not merged: next to merged weights they would be a second, unmerged model."""

_VARIANT = re.compile(r"model\.(\w+)(?:-\d+-of-\d+)?\.safetensors$")
# an adapter in the folder of a model is applied by Transformers when it loads the model
_NOT_CARRIED = (*OTHER_WEIGHTS, "*.safetensors", "*.safetensors.index.json", "adapter_config.json")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of safetensors files."""

    folder: Path
    config: Mapping[str, Any]  # the content of its `config.json`, empty if there is none
    files: tuple[TensorFile, ...]  # its weight files
    tensors: Mapping[str, StoredTensor]  # its tensors, by name; of a compressed weight, values and bitmask
    compressed: Mapping[str, CompressedTensor]  # its compressed weights, by name
    carried: tuple[Path, ...]  # the other files of the model, relative to the folder
    left_out: tuple[Path, ...]  # weights in the folder that are not part of the checkpoint, relative to it

    @property
    def layout(self) -> Layout:
        """Tells which weights are stored `(in, out)`."""
        return Layout({name: one.shape for name, one in self.dense.items()}, self.config, conv1d=None)

    @cached_property
    def dense(self) -> dict[str, StoredTensor | CompressedTensor]:
        """The tensors as they are without compression, by name, in the order of the files."""
        by_values = {one.values.name: one for one in self.compressed.values()}
        parts = {name for one in by_values.values() for name in (one.bitmask.name, *one.unread)}
        found = (by_values.get(name, tensor) for name, tensor in self.tensors.items() if name not in parts)
        return {one.name: one for one in found}

    @property
    def copies(self) -> dict[Path, Path]:
        """The other files of the model, by their relative path; all but the card, which is written again."""
        return {one: self.folder / one for one in self.carried if one != Path(CARD)}

    @property
    def size(self) -> int:
        """The bytes of a copy."""
        return sum(file.size for file in self.files) + sum((self.folder / one).stat().st_size for one in self.carried)


def read_checkpoint(folder: Path) -> Checkpoint:
    """List what a folder holds; only headers are read."""
    listing = list_folder(folder)
    if not listing.loaded:
        variants = sorted(match[1] for path in folder.iterdir() if (match := _VARIANT.match(path.name)))
        rest = "so Transformers would not load it either"
        if variants:
            rest = f"but a variant: load it with from_pretrained(..., variant={variants[0]!r}) and save it again"
        raise ValueError(f"{folder} holds neither {SINGLE} nor {INDEX}, {rest}")
    files = tuple(open_tensor_file(path, listed) for path, listed in read_headers(listing.files).items())
    tensors = {name: tensor for file in files for name, tensor in file.tensors.items()}
    carried, left_out = _other_files(folder, {file.path for file in files}, listing.index)
    config = read_config(folder)
    is_old = sparse_format(config) is not None
    compressed = find_compressed(tensors, [file.path for file in files], is_old=is_old)
    return Checkpoint(folder, config, files, tensors, compressed, tuple(carried), tuple(left_out))


def _other_files(folder: Path, weights: set[Path], index: Path | None) -> tuple[list[Path], list[Path]]:
    carried: list[Path] = []
    left_out: list[Path] = []
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in sorted(names):
            path = Path(where, name)
            # links of a download cache lead to files; what is neither (a socket, a broken link) is not the model's
            if name.startswith(".") or path in weights or not path.is_file():
                continue
            is_left_out = path != index and any(path.match(pattern) for pattern in _NOT_CARRIED)
            (left_out if is_left_out else carried).append(path.relative_to(folder))
    return carried, left_out
