# SPDX-License-Identifier: Apache-2.0
"""The commands `compress` and `decompress`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import JsonOption, print_report, progress_bar


ModelArgument = Annotated[str, typer.Argument(help="The model: a folder, or the id of a repository on the Hub.")]
OutArgument = Annotated[Path, typer.Argument(help="The folder to write to.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace a model in the folder, and nothing else.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Check and count, but write nothing.")]


def compress(
    model: ModelArgument,
    out: OutArgument,
    min_sparsity: Annotated[
        float | None,
        typer.Option(help="Layers with a smaller share of zeros stay dense; by default those that would not shrink."),
    ] = None,
    exclude_modules: Annotated[
        list[str] | None,
        typer.Option(help="Layers that stay dense, instead of the head: a name or its end for each time it is given."),
    ] = None,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """
    Stop storing the zeros of a pruned model's linear layers, from disk to disk, without losing a bit.

    The result loads with Transformers after `import peft_spp`. Either all of it is written, or nothing.
    """
    from ..compressed.on_disk import compress_checkpoint

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
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """
    Make plain safetensors of a compressed model again, bit for bit, from disk to disk.

    Either all of it is written, or nothing.
    """
    from ..compressed.on_disk import decompress_checkpoint

    with progress_bar("Decompressing") as progress:
        report = decompress_checkpoint(model, out, overwrite=overwrite, dry_run=dry_run, progress=progress)
    print_report(report, as_json)
