# SPDX-License-Identifier: Apache-2.0
"""The command `convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import JsonOption, OverwriteAdapterOption, print_report


def convert(
    adapter: Annotated[str, typer.Argument(help="The authors' adapter: a folder, or the id of a Hub repository.")],
    out: Annotated[Path, typer.Argument(help="The folder to write the SPP adapter to.")],
    base: Annotated[
        str | None,
        typer.Option(
            help="The base model to record in the adapter. By default, the one that the authors' adapter names."
        ),
    ] = None,
    overwrite: OverwriteAdapterOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read and check without writing anything.")] = False,
    as_json: JsonOption = False,
) -> None:
    """
    Convert an adapter from the SPP authors' code (lora_A.weight, lora_A.weight_col) to an SPP adapter.

    The factors are copied bit for bit, from either layout of the column factor.
    """
    from ..interchange import convert_adapter

    report = convert_adapter(adapter, out, base=base, overwrite=overwrite, dry_run=dry_run)
    print_report(report, as_json)
