# SPDX-License-Identifier: Apache-2.0
"""Tables on the terminal, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from .statistics import Summary


def make_console() -> Console:
    """The console that benchmarks print to. File names and numbers are not colored."""
    return Console(highlight=False, soft_wrap=True)


def print_table(
    console: Console, headings: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int | None = None
) -> None:
    """
    Print a table in Markdown, as wide as it is: a wrapped row would not be Markdown.

    Args:
        console (`Console`): Where to.
        headings (`Sequence[str]`): One for each column.
        rows (`Iterable[Sequence[str]]`): The cells.
        numbers_from (`int`, *optional*): The first column that is aligned to the right, by default the last.
    """
    first_number = len(headings) - 1 if numbers_from is None else numbers_from
    table = Table(box=box.MARKDOWN)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index >= first_number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    width = Measurement.get(console, console.options.update(width=10_000), table).maximum
    Console(file=console.file, width=width, highlight=False).print(table)


def format_seconds(summary: Summary) -> str:
    """A time and its quartiles in milliseconds, such as `12.3 (12.1–12.9)`."""
    return _with_quartiles(summary, 1e3)


def format_ratio(summary: Summary) -> str:
    """A ratio and its quartiles, such as `1.23 (1.21–1.29)`."""
    return f"{summary.median:.2f} ({summary.lower_quartile:.2f}–{summary.upper_quartile:.2f})"


def format_bytes(count: float) -> str:
    """A number of bytes in MiB, or in GiB from 10 GiB on."""
    mebibytes = count / 2**20
    return f"{mebibytes / 1024:.1f} GiB" if mebibytes >= 10 * 1024 else f"{mebibytes:.1f} MiB"


def _with_quartiles(summary: Summary, factor: float) -> str:
    median, lower, upper = (
        value * factor for value in (summary.median, summary.lower_quartile, summary.upper_quartile)
    )
    digits = 0 if median >= 1000 else 1 if median >= 10 else 3
    return f"{median:.{digits}f} ({lower:.{digits}f}–{upper:.{digits}f})"
