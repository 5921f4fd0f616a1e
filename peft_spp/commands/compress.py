# SPDX-License-Identifier: Apache-2.0
"""The commands `compress` and `decompress`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import JsonOption, OverwriteModelOption, print_report, progress_bar


ModelArgument = Annotated[str, typer.Argument(help="The model: a folder, or the id of a repository on the Hub.")]
OutArgument = Annotated[Path, typer.Argument(help="The folder to write to.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Check and count without writing anything.")]


def compress(
    model: ModelArgument,
    out: OutArgument,
    min_sparsity: Annotated[
        float | None,
        typer.Option(
            help="Keep layers dense whose share of zeros, from 0 to 1, is smaller than this. By default, layers that "
            "would not shrink."
        ),
    ] = None,
    exclude_modules: Annotated[
        list[str] | None,
        typer.Option(
            help="Layers to keep dense, instead of the head: names or suffixes (repeat the option for several)."
        ),
    ] = None,
    overwrite: OverwriteModelOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """
    Convert a pruned model to compressed weights, which do not store zeros, from disk to disk and without loss.

    The result loads with Transformers after `import peft_spp`. The output is written completely or not at all.
    """
    from ..compressed.checkpoint_run import compress_checkpoint

    with progress_bar("Compressing") as progress:
        report = compress_checkpoint(
            model,
            out,
            modules_to_not_convert=exclude_modules,
            min_sparsity=min_sparsity,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=progress,
        )
    print_report(report, as_json)


def decompress(
    model: ModelArgument,
    out: OutArgument,
    overwrite: OverwriteModelOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """
    Convert a compressed model back to plain safetensors, bit for bit, from disk to disk.

    The output is written completely or not at all.
    """
    from ..compressed.checkpoint_run import decompress_checkpoint

    with progress_bar("Decompressing") as progress:
        report = decompress_checkpoint(model, out, overwrite=overwrite, dry_run=dry_run, progress=progress)
    print_report(report, as_json)
