# SPDX-License-Identifier: Apache-2.0
"""The command `export`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .console import JsonOption, OverwriteAdapterOption, print_report


class ExportTarget(StrEnum):
    """The methods that an adapter can be exported to."""

    hira = "hira"


def export(
    adapter: Annotated[str, typer.Argument(help="The SPP adapter: a folder, or the id of a repository on the Hub.")],
    out: Annotated[Path, typer.Argument(help="The folder to write the exported adapter to.")],
    to: Annotated[ExportTarget, typer.Option(help="The PEFT method to export to.")] = ExportTarget.hira,
    overwrite: OverwriteAdapterOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read and check without writing anything.")] = False,
    as_json: JsonOption = False,
) -> None:
    """
    Convert an SPP adapter to an equivalent adapter of another PEFT method, which plain PEFT loads.

    A HiRA adapter has r · (m + n) parameters per layer instead of r · n + m.
    """
    from ..interchange import export_adapter

    report = export_adapter(adapter, out, to=to.value, overwrite=overwrite, dry_run=dry_run)
    print_report(report, as_json)
