# SPDX-License-Identifier: Apache-2.0
"""Tables as plain text."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


MAX_ROWS = 40
"""A table of more modules than this shows them by kind."""


def plain_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[str] = ()) -> str:
    """Draw a table without colors, as wide as its content.

    Args:
        columns (`Sequence[str]`): The heads of the columns.
        rows (`Iterable[Sequence[str]]`): The cells.
        right (`Iterable[str]`, *optional*): Which columns are aligned to the right.

    Returns:
        `str`: The lines of the table, without a newline at the end.
    """
    aligned_right = set(right)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in aligned_right else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    out = io.StringIO()
    console = Console(file=out, width=10_000, color_system=None, force_jupyter=False)
    console.print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


def percent(share: float) -> str:
    """A share as text.

    Args:
        share (`float`): Between 0 and 1.

    Returns:
        `str`: In percent, with two decimals; never rounded to 0 or 100 when it is not.
    """
    text = f"{100 * share:.2f}"
    if text == "0.00" and share > 0:
        return "<0.01 %"
    if text == "100.00" and share < 1:
        return ">99.99 %"
    return f"{text} %"


def some(names: Sequence[str], most: int = 5) -> str:
    """The first few of several names.

    Args:
        names (`Sequence[str]`): The names.
        most (`int`, *optional*, defaults to 5): How many to show.

    Returns:
        `str`: The names, and how many more there are.
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def kind_of(name: str) -> str:
    """The kind of a module: the last part of its name that is not a number.

    Args:
        name (`str`): The name of a module.

    Returns:
        `str`: Its kind, such as `q_proj`.
    """
    parts = [part for part in name.split(".") if not part.isdecimal()]
    return parts[-1] if parts else name
