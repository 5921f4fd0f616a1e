# SPDX-License-Identifier: Apache-2.0
"""The command `merge`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .console import JsonOption, OverwriteModelOption, print_report, progress_bar


class CheckBase(StrEnum):
    warn = "warn"
    error = "error"
    off = "off"


def merge(
    adapter: Annotated[str, typer.Argument(help="The adapter: a folder, or the id of a repository on the Hub.")],
    out: Annotated[Path, typer.Argument(help="The folder to write the merged model to.")],
    base: Annotated[
        str | None,
        typer.Option(help="The base model: a folder or a Hub id. By default, the one that the adapter names."),
    ] = None,
    check_base: Annotated[
        CheckBase,
        typer.Option(help="What to do if the base model's masks differ from those that the adapter was trained on."),
    ] = CheckBase.warn,
    overwrite: OverwriteModelOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Merge, check and count without writing anything.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """
    Merge an SPP adapter into a checkpoint, from disk to disk, in a few hundred megabytes of memory.

    The result has the same bits as `merge_and_unload`, and the base model's files and zeros. It is written completely
    or not at all. The merged model's config.json lists the adapter, so that it is not merged a second time.
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
