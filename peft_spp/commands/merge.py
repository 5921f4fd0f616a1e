# SPDX-License-Identifier: Apache-2.0
"""The command `merge`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .console import JsonOption, print_report, progress_bar


class CheckBase(StrEnum):
    warn = "warn"
    error = "error"
    off = "off"


def merge(
    adapter: Annotated[str, typer.Argument(help="The adapter: a folder, or the id of a repository on the Hub.")],
    out: Annotated[Path, typer.Argument(help="The folder to write the merged model to.")],
    base: Annotated[
        str | None,
        typer.Option(help="The base model: a folder or a Hub id. By default the one that the adapter names."),
    ] = None,
    check_base: Annotated[
        CheckBase,
        typer.Option(help="What to do if the base model is pruned in other places than that of the training."),
    ] = CheckBase.warn,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model in the folder, and nothing else.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Merge, check and count, but write nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """
    Merge an SPP adapter into a checkpoint, from disk to disk, in a few hundred megabytes of memory.

    The result has the bits of `merge_and_unload`, the base model's files and its zeros. Either all of it is written,
    or nothing. The merged model's config.json lists the adapter, which is not merged into it a second time.
    """
    from ..merge import merge_checkpoint

    with progress_bar("Checking" if dry_run else "Merging") as progress:
        report = merge_checkpoint(
            base,
            adapter,
            out,
            check_base=check_base.value,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=progress,
        )
    print_report(report, as_json)
