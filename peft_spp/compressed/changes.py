# SPDX-License-Identifier: Apache-2.0
"""What is written in the place of a checkpoint's files when it is compressed or decompressed."""

from __future__ import annotations

import json
import math
import os
import re
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.compressed_files import COLUMNS, bitmask_of, columns_text, read_metadata
from ..checkpoints.compressed_format import names_format
from ..checkpoints.compressed_tensor import CompressedTensor
from ..checkpoints.own_files import CARD, CONFIG
from ..checkpoints.safetensors_files import INDEX_SUFFIX, read_json
from ..checkpoints.tensor_file import StoredTensor
from ..checkpoints.writing import NewTensor, computed, copied
from ..functional.bitmask import bitmask_bytes, count_stored
from ..functional.compressed import compress
from ..installing import how_to_install
from .config import BitmaskConfig
from .models_on_disk import find_layers, plain_config
from .report import CompressedModule, CompressionReport
from .selection import module_name, why_not_worth_it


_NOTE = (
    "\n## Compressed weights\n\nThe zeros of this model's linear layers are not stored, and nothing is lost by that. "
    "Load it with Transformers after `import peft_spp` ({}), or make plain safetensors of it with "
    "`peft-spp decompress`.\n"
)
NOTE = _NOTE.format(how_to_install(code="`"))
"""What a compressed model's card says at its end."""
# an earlier version may have told of another way to install
_ANY_NOTE = re.compile(re.escape(_NOTE).replace(re.escape("{}"), "[^)]*"))


class Change:
    """What is written in the place of a checkpoint's files."""

    action = ""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.modules: dict[str, CompressedModule] = {}
        self.kept: dict[str, str] = {}

    def tensors(self, file: Path) -> list[NewTensor]:
        """The new tensors of a file, in the order of its bytes."""
        raise NotImplementedError

    def metadata(self, file: Path) -> dict[str, str]:
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """The new content of `config.json`."""
        raise NotImplementedError

    def card(self, text: str) -> str:
        raise NotImplementedError

    @cached_property
    def files(self) -> list[tuple[Path, list[NewTensor], dict[str, str]]]:
        """The new weight files: their relative path, tensors and metadata."""
        listed = [(one.path, self.tensors(one.path)) for one in self.checkpoint.files]
        folder = self.checkpoint.folder
        # bitmasks may have had a shard for themselves
        return [(path.relative_to(folder), tensors, self.metadata(path)) for path, tensors in listed if tensors]

    def texts(self) -> dict[Path, str]:
        """The new content of the files that speak of the tensors."""
        texts = {Path(CONFIG): json.dumps(self.config(), indent=2) + "\n"}
        for one in self.checkpoint.carried:
            path = self.checkpoint.folder / one
            if one.name.endswith(INDEX_SUFFIX):
                texts[one] = self._index(one)
            elif one == Path(CARD):
                texts[one] = self.card(path.read_bytes().decode("utf-8", "surrogateescape"))
        return texts

    def _index(self, index: Path) -> str:
        content = read_json(self.checkpoint.folder / index)
        files = self.files
        content["weight_map"] = {
            one.name: os.path.relpath(path, index.parent) for path, tensors, _ in files for one in tensors
        }
        metadata = content.get("metadata")
        if isinstance(metadata, dict) and "total_size" in metadata:
            metadata["total_size"] = sum(one.size for _, tensors, _ in files for one in tensors)
        if isinstance(metadata, dict) and "total_parameters" in metadata:
            # of a model that was compressed in memory Transformers has counted the values
            metadata["total_parameters"] = sum(math.prod(one.shape) for one in self.checkpoint.dense.values())
        return json.dumps(content, indent=2, sort_keys=True) + "\n"

    @property
    def size_before(self) -> int:
        """The bytes of all old tensors."""
        return sum(one.stop - one.start for one in self.checkpoint.tensors.values())

    @property
    def size(self) -> int:
        """The bytes of all new tensors."""
        return sum(one.size for _, tensors, _ in self.files for one in tensors)

    def report(self, output: str, overwritten: tuple[str, ...], *, dry_run: bool) -> CompressionReport:
        """What is done, or would be."""
        checkpoint = self.checkpoint
        return CompressionReport(
            model=str(checkpoint.folder),
            output=output,
            action=self.action,
            dry_run=dry_run,
            modules=self.modules,
            kept=self.kept,
            files=tuple(path.as_posix() for path, _, _ in self.files),
            carried=tuple(one.as_posix() for one in checkpoint.carried),
            left_out=tuple(one.as_posix() for one in checkpoint.left_out),
            overwritten=overwritten,
            bytes_before=self.size_before,
            bytes_after=self.size,
        )

    def record(self, name: str, weight: StoredTensor | CompressedTensor, stored: int) -> None:
        """Add a layer to the report."""
        shape, itemsize = weight.shape, _floating(weight).itemsize
        *rows, columns = shape
        self.modules[name] = CompressedModule(
            name=name,
            tensor=weight.name,
            file=weight.file.relative_to(self.checkpoint.folder).as_posix(),
            shape=shape,
            dtype=str(weight.dtype).removeprefix("torch."),
            stored=stored,
            dense_bytes=math.prod(shape) * itemsize,
            compressed_bytes=stored * itemsize + math.prod(rows) * bitmask_bytes(columns),
        )


class Compressing(Change):
    """A checkpoint without the zeros of its linear layers, which are counted when it is made."""

    action = "compress"

    def __init__(self, checkpoint: Checkpoint, config: BitmaskConfig) -> None:
        super().__init__(checkpoint)
        self._config = config
        layers, self.kept = find_layers(checkpoint, config.modules_to_not_convert)
        self._stored: dict[str, int] = {}
        for name, layer in layers.items():
            stored = {weight.name: count_stored(weight.load()) for weight in layer.tensors}
            dtype = _floating(layer.tensors[0])
            reason = why_not_worth_it(sum(stored.values()), layer.shape, dtype, config.min_sparsity)
            if reason is not None:
                self.kept[name] = reason
                continue
            self._stored |= stored
            for weight in layer.tensors:
                alone = len(layer.tensors) == 1
                self.record(name if alone else module_name(weight.name), weight, stored[weight.name])

    def tensors(self, file: Path) -> list[NewTensor]:
        bitmasks, others = [], []
        for one in self.checkpoint.dense.values():
            if one.file != file:
                continue
            if one.name not in self._stored:
                others.append(_dense(one))
                continue
            *rows, n = one.shape
            shape = (*rows, bitmask_bytes(n))
            # first, since rows of a multiple of 8 bytes keep what follows aligned, and are so themselves
            bitmasks.append(computed(bitmask_of(one.name), torch.uint8, shape, partial(_part, one, "bitmask")))
            stored = (self._stored[one.name],)
            others.append(computed(one.name, _floating(one), stored, partial(_part, one, "values")))
        return [*bitmasks, *others]

    def metadata(self, file: Path) -> dict[str, str]:
        columns = {name: self.checkpoint.dense[name].shape[-1] for name in self._stored}
        return {**read_metadata(file), **({COLUMNS: columns_text(columns)} if columns else {})}

    def config(self) -> dict[str, Any]:
        config = BitmaskConfig(list(self.kept), self._config.min_sparsity)
        return {**plain_config(self.checkpoint), "quantization_config": config.to_dict()}

    def card(self, text: str) -> str:
        return text + NOTE


class Decompressing(Change):
    """A compressed checkpoint with all its zeros."""

    action = "decompress"

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        # of a model without zeros no weight is compressed
        if not checkpoint.compressed and not names_format(checkpoint.config):
            raise ValueError(f"the model in {checkpoint.folder} is not compressed: none of its weights has a bitmask")
        for name, weight in checkpoint.compressed.items():
            self.record(module_name(name), weight, math.prod(weight.values.shape))

    def tensors(self, file: Path) -> list[NewTensor]:
        return [_dense(one) for one in self.checkpoint.dense.values() if one.file == file]

    def metadata(self, file: Path) -> dict[str, str]:
        metadata = read_metadata(file)
        metadata.pop(COLUMNS, None)
        return metadata

    def config(self) -> dict[str, Any]:
        return plain_config(self.checkpoint)

    def card(self, text: str) -> str:
        return _ANY_NOTE.sub("", text, count=1)


def _floating(tensor: StoredTensor | CompressedTensor) -> torch.dtype:
    if not isinstance(tensor.dtype, torch.dtype):
        raise ValueError(f"tensor {tensor.name!r} of {tensor.file} is {tensor.describe()}, which is not floating")
    return tensor.dtype


def _part(weight: StoredTensor | CompressedTensor, part: str) -> Tensor:
    tensor: Tensor = getattr(compress(weight.load()), part)
    return tensor


def _dense(tensor: StoredTensor | CompressedTensor) -> NewTensor:
    if isinstance(tensor, StoredTensor):
        return copied(tensor)
    return computed(tensor.name, _floating(tensor), tensor.shape, tensor.load)
