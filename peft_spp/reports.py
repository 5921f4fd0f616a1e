# SPDX-License-Identifier: Apache-2.0
"""What all reports share: their data for JSON, their table of modules and its cells, and totals."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from operator import attrgetter
from typing import Any, ClassVar, Generic, TypeVar

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


MAX_ROWS = 40
"""A table of more modules than this shows them by kind."""

Entry = TypeVar("Entry", bound=Any)


class PlainData:
    """A dataclass that can be written as JSON."""

    json_keys: ClassVar[tuple[str, ...]] = ()
    """What is written: by default all fields."""

    json_properties: ClassVar[tuple[str, ...]] = ()
    """Properties that are written with them: before the modules of a report, else last."""

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data for JSON.

        Returns:
            `dict[str, Any]`: Numbers, strings, lists and dicts only.
        """
        keys = list(self.json_keys) or [field.name for field in fields(self)]  # type: ignore[arg-type]
        place = keys.index("modules") if "modules" in keys else len(keys)
        keys[place:place] = self.json_properties
        values = {key: getattr(self, key) for key in keys}
        return {key: _plain(list(value.values()) if key == "modules" else value) for key, value in values.items()}


def _plain(value: Any) -> Any:
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(one) for one in value]
    return value if isinstance(value, (str, int, float, type(None))) else str(value)


class ModuleReport(PlainData, Generic[Entry]):
    """A report with one entry for each module: `report[name]` is one of them, iteration gives all entries."""

    modules: Mapping[str, Entry]

    def __getitem__(self, name: str) -> Entry:
        return self.modules[name]

    def __contains__(self, name: object) -> bool:
        return name in self.modules

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.modules.values())

    def __len__(self) -> int:
        return len(self.modules)

    def module_table(
        self, columns: Sequence[str], cells: Callable[[list[Entry]], list[str]], *, right: Iterable[str]
    ) -> str:
        """A table with a row for each module or, where they are many, for each kind of them.

        Args:
            columns (`Sequence[str]`): The heads of the columns; the first is that of the names.
            cells (`Callable[[list[Entry]], list[str]]`): Writes the other cells of a row for these entries.
            right (`Iterable[str]`): Which columns are aligned to the right.

        Returns:
            `str`: Its lines.
        """
        grouped = len(self) > MAX_ROWS
        groups: dict[str, list[Entry]] = {}
        for module in self:
            groups.setdefault(kind_of(module.name) if grouped else module.name, []).append(module)
        rows = [
            [called(title) + (f" x{len(group)}" if grouped else ""), *cells(group)] for title, group in groups.items()
        ]
        return plain_table(columns, rows, right=right)


def total(attribute: str) -> Any:
    """A property of a report: the sum of an attribute of its entries."""
    of = attrgetter(attribute)
    return property(lambda report: sum(of(module) for module in report))


def plain_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[str] = ()) -> str:
    """Draw a table without colors, as wide as its content, with the columns `right` aligned to the right."""
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


def share(count: int, numel: int) -> float:
    """The part `count` of `numel`, between 0 and 1; 0 of nothing."""
    return count / numel if numel else 0.0


def percent(share: float) -> str:
    """A share between 0 and 1 in percent, with two decimals; never rounded to 0 or 100 when it is not."""
    text = f"{100 * share:.2f}"
    if text == "0.00" and share > 0:
        return "<0.01 %"
    if text == "100.00" and share < 1:
        return ">99.99 %"
    return f"{text} %"


def shapes(modules: Iterable[Any]) -> str:
    """The shape of modules, or how many shapes they have."""
    found = dict.fromkeys(
        " x ".join(map(str, one.shape)) + (" (in, out)" if getattr(one, "transposed", False) else "")
        for one in modules
    )
    return next(iter(found)) if len(found) == 1 else f"{len(found)} shapes"


def distinct(values: Iterable[object]) -> str:
    """Each of several values once."""
    return ", ".join(dict.fromkeys(map(str, values)))


def span(values: Iterable[float], write: Callable[[float], str]) -> str:
    """From the least to the greatest value, or the one that all are."""
    listed = list(values)
    low, high = write(min(listed)), write(max(listed))
    return low if low == high else f"{low} to {high}"


def some(names: Sequence[str], most: int = 5) -> str:
    """The first few of several names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """The names that have each reason, in the order of the reasons' first names."""
    found: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        found.setdefault(reason, []).append(called(name))
    return found


def called(name: str) -> str:
    """How to call a module in a message or a table: by its name, or as `(root)` if it is the model itself."""
    return name or "(root)"


def kind_of(name: str) -> str:
    """The kind of a module, such as `q_proj`: the last part of its name that is not a number."""
    parts = [part for part in name.split(".") if not part.isdecimal()]
    return parts[-1] if parts else name
