# SPDX-License-Identifier: Apache-2.0
"""Compressing a checkpoint from disk to disk, and the way back."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.checkpoint import OTHER_WEIGHTS, Checkpoint, read_checkpoint
from ..checkpoints.hub import local_folder
from ..checkpoints.output import OutputFolder
from ..checkpoints.own_files import CARD, CONFIG, MODEL
from ..checkpoints.tensor_file import StoredTensor
from ..checkpoints.writing import NewTensor, computed, copied, write_tensors
from ..durable import sync_file
from ..functional.bitmask import bitmask_bytes, compress, count_stored
from ..sparsity.compressed_files import COLUMNS, bitmask_of, columns_text, read_metadata
from ..sparsity.safetensors_files import INDEX_SUFFIX, read_json
from .config import BitmaskConfig
from .models_on_disk import find_layers
from .report import CompressedModule, CompressionReport
from .selection import why_not_worth_it


Progress = Callable[[int, int], object]
"""Called with the bytes done and the bytes there are."""

NOTE = (
    "\n## Compressed weights\n\nThe zeros of this model's linear layers are not stored, and nothing is lost by that. "
    "Load it with Transformers after `import peft_spp` (`pip install peft-spp`), or make plain safetensors of it with "
    "`peft-spp decompress`.\n"
)
"""What a compressed model's card says at its end."""


def compress_checkpoint(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    modules_to_not_convert: Sequence[str] | None = None,
    min_sparsity: float | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> CompressionReport:
    """
    Stop storing the zeros of a checkpoint's linear layers, from disk to disk and one tensor at a time.

    The result is what `from_pretrained` with [`BitmaskConfig`] and `save_pretrained` make of the model;
    [`decompress_checkpoint`] gives every bit back. The output folder is changed in one step at the end.

    Args:
        model (`str` or `os.PathLike`): The model, as a local folder or the id of a repository on the Hub.
        output (`str` or `os.PathLike`): The folder to write to.
        modules_to_not_convert (`Sequence[str]`, *optional*): See [`BitmaskConfig`].
        min_sparsity (`float`, *optional*): See [`BitmaskConfig`].
        overwrite (`bool`, *optional*, defaults to `False`): Whether a model that is in `output` may be replaced.
        dry_run (`bool`, *optional*, defaults to `False`): Whether to check and count, but write nothing.
        progress (`Callable[[int, int], object]`, *optional*): Called with the bytes done and all bytes.

    Returns:
        [`CompressionReport`]: What was done.

    Raises:
        FileNotFoundError: If the model is not there.
        FileExistsError: If `output` must not be replaced.
        ValueError: If the model is quantized or compressed already, Transformers has no class for it, or a file is
            damaged.
        OSError: If there is no space for the output.
    """
    config = BitmaskConfig(modules_to_not_convert, min_sparsity)
    out, checkpoint = _open(model, output, overwrite)
    return _run(_Compressing(checkpoint, config), out, dry_run, progress)


def decompress_checkpoint(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> CompressionReport:
    """
    Make plain safetensors of a compressed checkpoint, from disk to disk and one tensor at a time.

    Args:
        model (`str` or `os.PathLike`): The model, as a local folder or the id of a repository on the Hub.
        output (`str` or `os.PathLike`): The folder to write to.
        overwrite (`bool`, *optional*, defaults to `False`): Whether a model that is in `output` may be replaced.
        dry_run (`bool`, *optional*, defaults to `False`): Whether to check and count, but write nothing.
        progress (`Callable[[int, int], object]`, *optional*): Called with the bytes done and all bytes.

    Returns:
        [`CompressionReport`]: What was done.

    Raises:
        FileNotFoundError: If the model is not there.
        FileExistsError: If `output` must not be replaced.
        ValueError: If the model is not compressed, or a file is damaged; the message names the tensor.
        OSError: If there is no space for the output.
    """
    out, checkpoint = _open(model, output, overwrite)
    return _run(_Decompressing(checkpoint), out, dry_run, progress)


def compress_in_place(folder: Path) -> CompressionReport:
    """
    Compress a checkpoint that nobody else reads, file by file.

    Args:
        folder (`Path`): Its folder.

    Returns:
        [`CompressionReport`]: What was done.
    """
    change = _Compressing(read_checkpoint(folder), BitmaskConfig())
    for relative, tensors, metadata in change.files:
        new = folder / relative.with_name(f".{relative.name}.compressing")
        write_tensors(new, tensors, metadata, lambda done: None)
        os.replace(new, folder / relative)
    for relative, text in change.texts().items():
        (folder / relative).write_text(text, encoding="utf-8")
    return change.report(str(folder), (), dry_run=False)


def _open(
    model: str | os.PathLike[str], output: str | os.PathLike[str], overwrite: bool
) -> tuple[OutputFolder, Checkpoint]:
    folder = local_folder(model, ignore=OTHER_WEIGHTS)
    out = OutputFolder(Path(output), overwrite, MODEL)
    out.check_apart_from(folder, "model")
    return out, read_checkpoint(folder)


class _Change:
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
        """The new metadata of a file."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """The new content of `config.json`."""
        raise NotImplementedError

    def card(self, text: str) -> str:
        """The new card."""
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

    def record(self, name: str, weight: StoredTensor, shape: tuple[int, ...], stored: int, itemsize: int) -> None:
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


class _Compressing(_Change):
    action = "compress"

    def __init__(self, checkpoint: Checkpoint, config: BitmaskConfig) -> None:
        super().__init__(checkpoint)
        self._config = config
        layers, self.kept = find_layers(checkpoint, config.modules_to_not_convert)
        self._stored: dict[str, int] = {}
        for name, weight in layers.items():
            dense = weight.load()
            stored = count_stored(dense)
            reason = why_not_worth_it(stored, dense.shape, dense.dtype, config.min_sparsity)
            if reason is not None:
                self.kept[name] = reason
                continue
            self._stored[weight.name] = stored
            self.record(name, weight, weight.shape, stored, dense.dtype.itemsize)

    def tensors(self, file: Path) -> list[NewTensor]:
        tensors = [one for one in self.checkpoint.tensors.values() if one.file == file]
        bitmasks, others = [], []
        for one in tensors:
            if one.name not in self._stored:
                others.append(copied(one))
                continue
            rows, n = one.shape
            shape = (rows, bitmask_bytes(n))
            # first, since rows of a multiple of 8 bytes keep what follows aligned, and are so themselves
            bitmasks.append(computed(bitmask_of(one.name), torch.uint8, shape, partial(_part, one, "bitmask")))
            stored = (self._stored[one.name],)
            others.append(computed(one.name, _floating(one), stored, partial(_part, one, "values")))
        return [*bitmasks, *others]

    def metadata(self, file: Path) -> dict[str, str]:
        columns = {name: self.checkpoint.tensors[name].shape[1] for name in self._stored}
        return {**read_metadata(file), **({COLUMNS: columns_text(columns)} if columns else {})}

    def config(self) -> dict[str, Any]:
        config = BitmaskConfig(list(self.kept), self._config.min_sparsity)
        return {**self.checkpoint.config, "quantization_config": config.to_dict()}

    def card(self, text: str) -> str:
        return text + NOTE


class _Decompressing(_Change):
    action = "decompress"

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        if not checkpoint.compressed:
            raise ValueError(f"the model in {checkpoint.folder} is not compressed: it has no bitmask")
        for name, weight in checkpoint.compressed.items():
            dtype = _floating(weight.values)
            self.record(
                name.removesuffix(".weight"), weight.values, weight.shape, weight.values.shape[0], dtype.itemsize
            )

    def tensors(self, file: Path) -> list[NewTensor]:
        compressed = self.checkpoint.compressed
        bitmasks = {weight.bitmask.name for weight in compressed.values()}
        tensors = []
        for one in self.checkpoint.tensors.values():
            if one.file != file or one.name in bitmasks:
                continue
            weight = compressed.get(one.name)
            tensors.append(
                copied(one) if weight is None else computed(one.name, _floating(one), weight.shape, weight.load)
            )
        return tensors

    def metadata(self, file: Path) -> dict[str, str]:
        metadata = read_metadata(file)
        metadata.pop(COLUMNS, None)
        return metadata

    def config(self) -> dict[str, Any]:
        return {name: value for name, value in self.checkpoint.config.items() if name != "quantization_config"}

    def card(self, text: str) -> str:
        return text.removesuffix(NOTE)


def _floating(tensor: StoredTensor) -> torch.dtype:
    if not isinstance(tensor.dtype, torch.dtype):
        raise ValueError(f"tensor {tensor.name!r} of {tensor.file} is {tensor.describe()}, which is not floating")
    return tensor.dtype


def _part(weight: StoredTensor, part: str) -> Tensor:
    tensor: Tensor = getattr(compress(weight.load()), part)
    return tensor


def _run(change: _Change, out: OutputFolder, dry_run: bool, progress: Progress | None) -> CompressionReport:
    checkpoint = change.checkpoint
    out.check(checkpoint.size - change.size_before + change.size, checkpoint.copies)
    report = change.report(str(out.path), out.replaced, dry_run=dry_run)
    if dry_run:
        return report
    done = 0

    def count(written: int) -> None:
        nonlocal done
        done += written
        if progress is not None:
            progress(done, report.bytes_after)

    with out:
        for relative, tensors, metadata in change.files:
            path = out.new_file(relative)
            write_tensors(path, tensors, metadata, count)
            sync_file(path)
        texts = change.texts()
        for one in checkpoint.carried:
            path = out.new_file(one)
            if one in texts:
                path.write_bytes(texts[one].encode("utf-8", "surrogateescape"))
            else:
                shutil.copyfile(checkpoint.folder / one, path)
            sync_file(path)
        out.publish()
    return report
