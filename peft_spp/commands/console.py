# SPDX-License-Identifier: Apache-2.0
"""What the commands have in common: errors, progress and reports."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Protocol

import typer


JsonOption = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
TargetModulesOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Which linear layers: names or their ends, one for each time the option is given, or one regular "
        "expression for the whole name, as in PEFT."
    ),
]
ExcludeModulesOption = Annotated[list[str] | None, typer.Option(help="Which of them not, told in the same way.")]


class Report(Protocol):
    """What a command prints."""

    def to_dict(self) -> dict[str, Any]: ...


def print_report(report: Report, as_json: bool) -> None:
    """Print a report to the standard output, as JSON or as text."""
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else str(report))


@contextmanager
def errors_as_messages(exit_code: int = 1) -> Iterator[None]:
    """While active, an error that says what is wrong ends the command with that line instead of a traceback."""
    try:
        yield
    except (ImportError, OSError, ValueError) as error:
        typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(code=exit_code) from error


@contextmanager
def needs_train_extra() -> Iterator[None]:
    """Turn a missing package of the `train` extra into an error that says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("trl", "datasets"):
            raise
        typer.echo(f'Error: {error.name} is not installed. Install it with: pip install "peft-spp[train]"', err=True)
        raise typer.Exit(code=1) from error


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int], object]]:
    """Show a bar on a terminal while active, and nothing elsewhere.

    Args:
        description (`str`): What goes on.

    Yields:
        `Callable[[int, int], object]`: To be called with what is done and what there is.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def as_modules(values: list[str] | None) -> str | list[str] | None:
    """What the values of an option say about modules, as PEFT has it: names, or one regular expression."""
    if not values:
        return None
    if len(values) == 1 and not all(character.isalnum() or character in "._" for character in values[0]):
        return values[0]
    return values
