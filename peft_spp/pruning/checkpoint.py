# SPDX-License-Identifier: Apache-2.0
"""Pruning a checkpoint, from disk to disk, with one block in memory at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.card import read_card
from ..checkpoints.checkpoint import OTHER_WEIGHTS, Checkpoint, read_checkpoint
from ..checkpoints.hub import hub_id, local_folder
from ..checkpoints.output import OutputFolder
from ..checkpoints.own_files import CARD, MODEL
from ..compressed.checkpoint_run import compress_in_place
from ..compressed.models_on_disk import check_can_be_compressed
from ..devices import usable_device
from ..durable import sync_file
from ..sparsity import NMPattern
from .by_block import check_in_blocks
from .calibration_data import CalibrationInputs, calibration_inputs
from .calibration_file import SAMPLES, calibration_from_file
from .checkpoint_run import CheckpointRun, Progress
from .layers import (
    check_divisible,
    check_unshared,
    prunable_layers,
)
from .model_card import pruned_card
from .preflight import check_in_one_block, check_tokens
from .registry import create_method, option_names
from .report import PruneReport
from .skeleton import Skeleton


Batches = Iterable[Tensor | Mapping[str, Tensor]]


def prune_checkpoint(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    method: str = "wanda",
    pattern: str | NMPattern | None = None,
    sparsity: float | None = None,
    calibration: str | os.PathLike[str] | Batches | None = None,
    samples: int = SAMPLES,
    sequence_length: int | None = None,
    seed: int = 0,
    target_modules: str | Iterable[str] | None = None,
    exclude_modules: str | Iterable[str] | None = None,
    device: str | torch.device | None = None,
    compress: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> PruneReport:
    """
    Prune a checkpoint, from disk to disk, with one transformer block in memory at a time.

    The result is what [`prune_wanda`], [`prune_sparsegpt`] or [`prune_magnitude`] makes of the model in memory. It
    takes the memory of the embeddings while the calibration data enters the model, and after that of one block, of
    what the method measures of its inputs, and of the hidden states of the calibration data (128 samples of 2048
    tokens of a 7B model: 2 GB in bfloat16).

    The files of the model are copied, its weight files included, and pruned weights written into their places in the
    copies: the shards, the index, the configuration, the tokenizer and the generation settings are those of the model,
    and its card describes the pruning. Weights in other formats are left out: they would be unpruned. The output
    folder is changed in one step at the end, as a whole or not at all.

    Args:
        model (`str` or `os.PathLike`): The model, as a local folder or the id of a repository on the Hub.
        output (`str` or `os.PathLike`): The folder to write the pruned model to.
        method (`str`, *optional*, defaults to `"wanda"`): `"wanda"`, `"magnitude"` or `"sparsegpt"`.
        pattern (`str` or `NMPattern`, *optional*): N:M pattern such as `"2:4"`. Give either this or `sparsity`.
        sparsity (`float`, *optional*): Fraction of the weights to prune, in [0, 1).
        calibration (`str`, `os.PathLike` or `Iterable`, *optional*):
            The calibration data: a file of plain text, or of JSON (lines or an array), CSV or Parquet with a `"text"`
            in each row, possibly compressed; or batches of token ids or of keyword arguments of the model's forward.
            Files other than plain text need the extra `train`. Magnitude pruning does without.
        samples (`int`, *optional*, defaults to 128): How many sequences to draw from the file.
        sequence_length (`int`, *optional*): The tokens in each; by default 2048, or the model's context if shorter.
        seed (`int`, *optional*, defaults to 0): Seed of the draw.
        target_modules (`str` or `Iterable[str]`, *optional*):
            Which linear layers, as in PEFT: a regular expression that the whole name must match, or names of which
            one must be the layer's name or its end. By default all linear layers in the transformer blocks, experts
            included.
        exclude_modules (`str` or `Iterable[str]`, *optional*): Layers to skip, in the same format.
        device (`str` or `torch.device`, *optional*): Where to compute; by default on a CUDA GPU if there is one.
        compress (`bool`, *optional*, defaults to `False`):
            Whether to write the pruned model without its zeros; see [`~peft_spp.BitmaskConfig`].
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether a model that is in `output` may be replaced. Files that are not known to be a model's are refused.
        dry_run (`bool`, *optional*, defaults to `False`):
            Whether to check everything that a run checks before it prunes, with a pass of the first calibration batch
            through the dense model, and to report what would be pruned and which files replaced, but write nothing.
        progress (`Callable[[int, int], object]`, *optional*): Called with the steps done and all there are.
        **options (`Any`): The method's own: `damping` and `block_size` of [`prune_sparsegpt`].

    Returns:
        `PruneReport`: What was pruned.

    Raises:
        FileNotFoundError: If the model or the calibration file is not there.
        FileExistsError: If `output` must not be replaced, or somebody else has written to it meanwhile.
        TypeError: If the method does not have an option.
        ValueError: If an argument cannot be used, the blocks of the model cannot be found, a weight is not finite, or
            there is too little calibration data; the message names the value, the tensor or the file.
        OSError: If there is no space for the output.

    Example:

    ```py
    >>> from peft_spp.pruning import prune_checkpoint

    >>> report = prune_checkpoint("path/to/model", "pruned", method="wanda", pattern="2:4", calibration="texts.jsonl")
    ```
    """
    chosen = create_method(method, pattern, sparsity, options)
    if chosen.statistics is not None and calibration is None:
        raise ValueError(
            f"method={method!r} needs calibration data: pass a file of text or JSON lines as calibration, or use "
            "method='magnitude'"
        )
    where = usable_device(device)
    folder = local_folder(model, ignore=OTHER_WEIGHTS)
    out = OutputFolder(Path(output), overwrite, MODEL)
    out.check_apart_from(folder, "model")
    checkpoint = read_checkpoint(folder)
    out.check(checkpoint.size, checkpoint.copies)
    if compress:
        check_can_be_compressed(checkpoint)
    dense_card = read_card(folder / CARD)
    skeleton = Skeleton(checkpoint, where)
    layers = skeleton.find_targets(target_modules, exclude_modules)
    check_divisible(layers, chosen.pattern)
    chosen.check_sparsity(layers)
    settings: dict[str, Any] = {"method": method, "pattern": pattern and str(pattern), "sparsity": sparsity}
    data: list[CalibrationInputs] = []
    if chosen.statistics is not None and calibration is not None:
        check_in_blocks(layers, skeleton.blocks_name, chosen)
        check_unshared(skeleton.model, layers)
        check_in_one_block(skeleton, layers)
        batches: Batches
        if isinstance(calibration, (str, os.PathLike)):
            empty = skeleton.model
            batches, used = calibration_from_file(calibration, folder, empty, samples, sequence_length, seed)
        else:
            batches, used = calibration, {"calibration": "batches passed in Python"}
        settings |= used
        data = list(calibration_inputs(batches))
        check_tokens(skeleton, data)
    settings |= {option: getattr(chosen, option) for option in option_names(type(chosen))}

    run = CheckpointRun(chosen, skeleton, layers, progress)
    run.look(data, 0 if dry_run else run.steps(len(data)))
    if dry_run:
        return _report(run, out, settings, dry_run)
    with out:
        copies = _copy_files(checkpoint, out)
        run.prune(data, copies)
        report = _report(run, out, settings, dry_run)
        card = out.new_file(Path(CARD))
        card.write_text(str(pruned_card(dense_card, report, chosen, hub_id(model))), encoding="utf-8")
        if compress:
            compress_in_place(card.parent)
        for path in {card, *copies.values()}:
            sync_file(path)
        out.publish()
    return report


def _copy_files(checkpoint: Checkpoint, out: OutputFolder) -> dict[Path, Path]:
    """Copy all files of a model, and tell which is the copy of which."""
    originals = [*(file.path for file in checkpoint.files), *checkpoint.copies.values()]
    copies = {original: out.new_file(original.relative_to(checkpoint.folder)) for original in originals}
    for original, copy in copies.items():
        shutil.copyfile(original, copy)
    return copies


def _report(run: CheckpointRun, output: OutputFolder, settings: dict[str, Any], dry_run: bool) -> PruneReport:
    checkpoint = run.skeleton.checkpoint
    linear = prunable_layers(run.skeleton.model)
    return PruneReport(
        model=str(checkpoint.folder),
        output=str(output.path),
        dry_run=dry_run,
        settings=settings,
        modules=run.modules,
        left_dense=tuple(name for name in linear if name not in run.layers),
        files=tuple(file.path.relative_to(checkpoint.folder).as_posix() for file in checkpoint.files),
        carried=tuple(one.as_posix() for one in checkpoint.carried),
        left_out=tuple(one.as_posix() for one in checkpoint.left_out),
        overwritten=output.replaced,
        size=checkpoint.size,
    )
