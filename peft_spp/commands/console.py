# SPDX-License-Identifier: Apache-2.0
"""What the commands have in common: errors, progress and reports."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Protocol

import typer

from ..checkpoints.names import names_or_expression
from ..installing import how_to_install
from .terminal import print_text


JsonOption = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
TargetModulesOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Linear layers to include: names or suffixes (repeat the option for several), or one regular expression "
        "for the full name, as in PEFT."
    ),
]
ExcludeModulesOption = Annotated[list[str] | None, typer.Option(help="Layers to skip, in the same format.")]


def _overwrite_option(what: str) -> Any:
    otherwise = "which is refused otherwise. A folder with other files is always refused."
    return typer.Option("--overwrite", help=f"Replace an existing {what} in the output folder, {otherwise}")


OverwriteModelOption = Annotated[bool, _overwrite_option("model")]
OverwriteAdapterOption = Annotated[bool, _overwrite_option("adapter")]


class Report(Protocol):
    """What a command prints."""

    def to_dict(self) -> dict[str, Any]: ...


def print_report(report: Report, as_json: bool) -> None:
    """Print a report to the standard output, as JSON or as text."""
    print_text(json.dumps(report.to_dict(), indent=2) if as_json else str(report))


@contextmanager
def needs_train_extra() -> Iterator[None]:
    """Turn a missing package of the `train` extra into an error that says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("trl", "datasets"):
            raise
        raise ImportError(
            f"{error.name} is not installed. Install it with: {how_to_install('train')}", name=error.name
        ) from error


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int], object]]:
    """Show a bar on a terminal while active, and nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def as_modules(values: list[str] | None, option: str) -> str | list[str] | None:
    """What the values of an option say about modules, as PEFT has it: names, or one regular expression."""
    return names_or_expression(values, option) if values else None
