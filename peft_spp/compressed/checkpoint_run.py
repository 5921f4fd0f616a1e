# SPDX-License-Identifier: Apache-2.0
"""Compressing a checkpoint from disk to disk, and the way back."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from ..checkpoints.checkpoint import OTHER_WEIGHTS, Checkpoint, read_checkpoint
from ..checkpoints.hub import local_folder
from ..checkpoints.output import OutputFolder
from ..checkpoints.own_files import MODEL
from ..checkpoints.writing import write_tensors
from ..durable import sync_file
from .changes import Change, Compressing, Decompressing
from .config import BitmaskConfig
from .report import CompressionReport


Progress = Callable[[int, int], object]
"""Called with the bytes done and the bytes there are."""


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
    Stop storing the zeros of a checkpoint's linear layers and experts, from disk to disk and one tensor at a time.

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
    return _run(Compressing(checkpoint, config), out, dry_run, progress)


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
    return _run(Decompressing(checkpoint), out, dry_run, progress)


def compress_in_place(folder: Path) -> CompressionReport:
    """Compress a checkpoint that nobody else reads, file by file."""
    change = Compressing(read_checkpoint(folder), BitmaskConfig())
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


def _run(change: Change, out: OutputFolder, dry_run: bool, progress: Progress | None) -> CompressionReport:
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
