# SPDX-License-Identifier: Apache-2.0
"""What all reports have in common: they hold one entry for each module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar


Entry = TypeVar("Entry")


class ByModule(Generic[Entry]):
    """A report that is a mapping of modules: `report[name]` is one of them, iteration gives all entries.

    Args:
        modules (`Mapping[str, Entry]`): The entries, by the name of their module.
    """

    modules: Mapping[str, Entry]

    def __getitem__(self, name: str) -> Entry:
        return self.modules[name]

    def __contains__(self, name: object) -> bool:
        return name in self.modules

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.modules.values())

    def __len__(self) -> int:
        return len(self.modules)
