# SPDX-License-Identifier: Apache-2.0
"""
Merging an adapter into a checkpoint, from disk to disk: the steps, and the folders.

What does not fit is refused where it is found: in the adapter (`adapter.py`), between adapter and checkpoint
(`plan.py`), between masks (`base_check.py`), or in a weight (`pieces.py`).
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from torch import Tensor

from ..checkpoints.card import read_card
from ..checkpoints.checkpoint import OTHER_WEIGHTS, Checkpoint, read_checkpoint
from ..checkpoints.hub import hub_id, local_folder
from ..checkpoints.output import OutputFolder, write_file
from ..checkpoints.own_files import CARD, CONFIG, MODEL
from ..checkpoints.safetensors_files import read_header
from ..checkpoints.tensor_file import TensorFile
from ..durable import sync_file
from ..sparsity.counting import PairCounts
from ..tuner.adapter_files import ADAPTER_FILES, named_adapters
from ..tuner.saved_adapter import read_settings
from .adapter import load_adapter, named_base
from .base_check import CHECKS, CheckBase, check_merged_before, mark_merged
from .base_check import check_base as compare_base
from .model_card import merged_card
from .pieces import merged_pieces, piece_workers
from .plan import Merge, Plan, plan_merge
from .report import MergedModule, MergeReport


Progress = Callable[[int, int], object]
"""Called with the bytes done and the bytes there are."""


def merge_checkpoint(
    base: str | os.PathLike[str] | None,
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    adapter_subfolder: str | None = None,
    check_base: CheckBase = "warn",
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """
    Merge an SPP adapter into a checkpoint, from disk to disk, without loading the model.

    Every tensor of the output is bit for bit what `PeftModel.from_pretrained(...).merge_and_unload()` and
    `save_pretrained` give of a model that is loaded in the dtypes of its checkpoint. A weight file is read and written
    once, in pieces, so the merge needs a few hundred megabytes, however large the model is. The header of each file
    is unchanged, and so are all tensors that the adapter does not change.

    The base model should be the one that the adapter was trained on: its masks are compared with those that the
    adapter remembers. The merged model's `config.json` lists the adapter, which is not merged into it again.

    Of the base model's folder everything is copied but hidden files and folders, weights in other formats (pickled,
    GGUF, ONNX, ...) and safetensors that are not part of the checkpoint: they would be unmerged.

    The output folder is changed in one step at the end: if anything goes wrong before, it is unchanged, and if the
    process is killed, a hidden folder next to it is all that is left.

    Args:
        base (`str`, `os.PathLike` or `None`):
            The base model, as a local folder or the id of a repository on the Hub, in `model.safetensors` or in shards
            with their index. With `None`, the base model that the adapter names, in the revision that it names.
        adapter (`str` or `os.PathLike`): The adapter, as a local folder or the id of a repository on the Hub.
        output (`str` or `os.PathLike`): The folder to write the merged model to.
        adapter_subfolder (`str`, *optional*): The folder inside of `adapter` that holds the adapter.
        check_base (`str`, *optional*, defaults to `"warn"`):
            What to do if the base model has other masks than the one that the adapter was trained on:
            `"warn"`, `"error"`, or `"off"` to compare nothing.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether a model that is in `output` may be replaced. Files that are not known to be a model's are refused.
        dry_run (`bool`, *optional*, defaults to `False`): Whether to merge, check and count, but write nothing.
        progress (`Callable[[int, int], object]`, *optional*):
            Called with the number of bytes done and of all bytes of the weight files, again and again.

    Returns:
        `MergeReport`: What was merged, and what became of the zeros.

    Raises:
        FileNotFoundError: If the base model or the adapter is not there.
        FileExistsError: If `output` must not be replaced, or somebody else has written to it meanwhile.
        ValueError: If a file is damaged, the adapter does not fit the checkpoint, holds what cannot be merged here, or
            is broken, so that a merged value would not be finite. The message names the file and the tensor.
        OSError: If there is no space for the output.
    """
    if check_base not in CHECKS:
        raise ValueError(f"check_base={check_base!r} is not one of {', '.join(map(repr, CHECKS))}")
    adapter_folder = _adapter_folder(adapter, adapter_subfolder)
    _, config = read_settings(adapter_folder)
    base_folder = (
        named_base(adapter_folder, config, ignore=OTHER_WEIGHTS)
        if base is None
        else local_folder(base, ignore=OTHER_WEIGHTS)
    )
    folder = OutputFolder(Path(output), overwrite, MODEL)
    folder.check_apart_from(base_folder, "base model")
    folder.check_apart_from(adapter_folder, "adapter")
    checkpoint = read_checkpoint(base_folder)
    folder.check(checkpoint.size, checkpoint.copies)
    loaded = load_adapter(adapter_folder)
    if others := [one.name for one in named_adapters(adapter_folder)]:
        warnings.warn(
            f"Only the adapter in {adapter_folder} itself is merged, not those in its subfolders: "
            f"{', '.join(others)}. To merge one of them, name its own folder, such as {adapter_folder / others[0]}.",
            stacklevel=2,
        )
    merged_id = check_merged_before(loaded, checkpoint)
    plan = plan_merge(checkpoint, loaded)
    base_masks = compare_base(loaded, checkpoint, check_base, plan)
    base_card = read_card(base_folder / CARD)

    if dry_run:
        zeros = count_zeros(checkpoint, plan, progress)
        return _report(checkpoint, adapter_folder, folder, dry_run, plan, zeros, base_masks)
    counted = _Counted(checkpoint, progress)
    with folder, piece_workers() as workers:
        _write(folder, checkpoint, plan, counted, workers)
        report = _report(checkpoint, adapter_folder, folder, dry_run, plan, counted.zeros, base_masks)
        card = str(
            merged_card(base_card, report, hub_id(base or str(config.base_model_name_or_path)), hub_id(adapter))
        )
        for name, text in ((CARD, card), (CONFIG, mark_merged(checkpoint, merged_id))):
            path = folder.new_file(Path(name))
            path.write_text(text, encoding="utf-8")
            sync_file(path)
        folder.publish()
    return report


def _adapter_folder(adapter: str | os.PathLike[str], subfolder: str | None) -> Path:
    inside = f"{subfolder}/" if subfolder else ""
    files = [f"{inside}{name}" for name in ADAPTER_FILES]
    return local_folder(adapter, allow=files) / (subfolder or "")


def count_zeros(checkpoint: Checkpoint, plan: Plan, progress: Progress | None = None) -> dict[str, PairCounts]:
    """Merge, write nothing, and tell what became of the zeros of each merged weight, by the name of its module."""
    counted = _Counted(checkpoint, progress)
    with piece_workers() as workers:
        for file in checkpoint.files:
            for _ in counted.pieces(workers, file, plan):
                pass
    return counted.zeros


@dataclass
class _Counted:
    """Passes pieces on, adds up their counts and tells how far the merge is."""

    checkpoint: Checkpoint  # what they are pieces of
    progress: Progress | None  # called after each piece
    done: int = 0  # how many bytes there were
    # the counts of each merged weight, by the name of its module
    zeros: dict[str, PairCounts] = field(default_factory=dict)

    @cached_property
    def total(self) -> int:
        return sum(file.size for file in self.checkpoint.files)

    def pieces(self, workers: ThreadPoolExecutor, file: TensorFile, plan: Plan) -> Iterator[Tensor]:
        for written in merged_pieces(workers, file, plan):
            if written.piece.merge is not None:
                self.zeros.setdefault(written.piece.merge.module.name, PairCounts()).add(written.counts)
            self.done += written.data.numel()
            yield written.data
            if self.progress is not None:
                self.progress(self.done, self.total)


def _write(
    folder: OutputFolder, checkpoint: Checkpoint, plan: Plan, counted: _Counted, workers: ThreadPoolExecutor
) -> None:
    syncs = []
    # one file goes to the disk while the next one is merged
    with ThreadPoolExecutor(1, "peft-spp-sync") as syncing:
        for file in checkpoint.files:
            path = folder.new_file(file.path.relative_to(checkpoint.folder))
            write_file(path, counted.pieces(workers, file, plan))
            _check_written(file, path)
            syncs.append(syncing.submit(sync_file, path))
        for one, original in checkpoint.copies.items():
            if one == Path(CONFIG):
                continue
            path = folder.new_file(one)
            shutil.copyfile(original, path)
            syncs.append(syncing.submit(sync_file, path))
    for sync in syncs:
        sync.result()


def _check_written(file: TensorFile, path: Path) -> None:
    """Read the header back from disk with `safetensors` and compare it with that of the base."""
    written = {one.key: (one.dtype, one.shape) for one in read_header(path)}
    if written != {name: (one.dtype, one.shape) for name, one in file.tensors.items()}:
        raise ValueError(f"{path.name} does not contain the tensors that were written to it. Nothing was merged.")


def _report(
    checkpoint: Checkpoint,
    adapter: Path,
    output: OutputFolder,
    dry_run: bool,
    plan: Plan,
    zeros: Mapping[str, PairCounts],
    base_masks: str,
) -> MergeReport:
    by_module: dict[str, list[Merge]] = {}
    for merge in (one for merges in plan.merges.values() for one in merges):
        by_module.setdefault(merge.module.name, []).append(merge)
    modules = [_merged_module(checkpoint, merges, zeros[name]) for name, merges in by_module.items()]
    stored = sum(len(file.tensors) for file in checkpoint.files)
    return MergeReport(
        base=str(checkpoint.folder),
        adapter=str(adapter),
        output=str(output.path),
        dry_run=dry_run,
        modules={module.name: module for module in modules},
        replaced=tuple(plan.replaced),
        copied=stored - len(plan.merges) - len(plan.replaced),
        files=tuple(file.path.relative_to(checkpoint.folder).as_posix() for file in checkpoint.files),
        carried=tuple(one.as_posix() for one in checkpoint.carried),
        left_out=tuple(one.as_posix() for one in checkpoint.left_out),
        base_masks=base_masks,
        overwritten=output.replaced,
        size=checkpoint.size,
    )


def _merged_module(checkpoint: Checkpoint, merges: list[Merge], zeros: PairCounts) -> MergedModule:
    weights, module = [one.weight for one in merges], merges[0].module
    shape = (module.B.shape[0], module.A.shape[1])
    return MergedModule(
        name=module.name,
        tensor=", ".join(one.name for one in weights),
        file=", ".join(dict.fromkeys(one.file.relative_to(checkpoint.folder).as_posix() for one in weights)),
        shape=shape[::-1] if merges[0].transposed else shape,
        dtype=str(weights[0].dtype).removeprefix("torch."),
        transposed=merges[0].transposed,
        r=module.r,
        scaling=module.scaling,
        zeros_before=zeros.zeros_before,
        zeros_after=zeros.zeros_after,
        lost=zeros.lost,
        gained=zeros.gained,
        non_finite=zeros.non_finite,
    )
