# SPDX-License-Identifier: Apache-2.0
"""What the commands `export` and `convert` do."""

from __future__ import annotations

import json
from collections.abc import Callable

import typer

from .report import InterchangeReport


def run_and_report(work: Callable[[], InterchangeReport], as_json: bool) -> None:
    """
    Do the work of a command and print its report, or why it failed.

    Args:
        work (`Callable[[], InterchangeReport]`): The work.
        as_json (`bool`): Whether to print the report as JSON.

    Raises:
        typer.Exit: With code 1 if the work failed in a way that the user can mend.
    """
    try:
        report = work()
    except (ImportError, OSError, ValueError) as error:
        typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(code=1) from error
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else str(report))
