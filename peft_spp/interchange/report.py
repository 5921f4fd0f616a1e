# SPDX-License-Identifier: Apache-2.0
"""What an export or a conversion did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..checkpoints.output import overwritten_line
from ..sparsity.by_module import ByModule
from ..sparsity.table import MAX_ROWS, kind_of, plain_table


@dataclass(frozen=True)
class ExchangedModule:
    """What was written for one module.

    Args:
        name (`str`): The name of the module.
        in_features (`int`): The number of inputs n.
        out_features (`int`): The number of output rows m.
        r (`int`): The number of row blocks of the SPP adapter.
        scaling (`float`): The scaling s of the SPP adapter.
        parameters (`int`): How many numbers were written for it.
    """

    name: str
    in_features: int
    out_features: int
    r: int
    scaling: float
    parameters: int


@dataclass(frozen=True)
class InterchangeReport(ByModule[ExchangedModule]):
    """What an export or a conversion did. `str()` gives a table, iteration the modules, `report[name]` one of them.

    Args:
        adapter (`str`): The folder of the adapter that was read.
        output (`str`): The folder of the adapter that was written.
        source (`str`): The method of the one that was read.
        method (`str`): The method of the one that was written, as PEFT calls it.
        dry_run (`bool`): Whether nothing was written.
        modules (`Mapping[str, ExchangedModule]`): The adapted modules, by name.
        others (`tuple[str, ...]`): The tensors besides the factors, which were copied (`modules_to_save`).
        overwritten (`tuple[str, ...]`): The files of an old adapter in the output folder that gave way to the new one.
        size (`int`): How many bytes the tensors take.
    """

    adapter: str
    output: str
    source: str
    method: str
    dry_run: bool
    modules: Mapping[str, ExchangedModule]
    others: tuple[str, ...]
    overwritten: tuple[str, ...]
    size: int

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data for JSON.

        Returns:
            `dict[str, Any]`: Numbers, strings, lists and dicts only.
        """
        return {
            **vars(self),
            "modules": [vars(module) for module in self],
            "others": list(self.others),
            "overwritten": list(self.overwritten),
        }

    def __str__(self) -> str:
        what = "Would write" if self.dry_run else "Wrote"
        groups: dict[str, list[ExchangedModule]] = {}
        for module in self:
            groups.setdefault(kind_of(module.name) if len(self) > MAX_ROWS else module.name, []).append(module)
        columns = ("module", "out x in", "r", "scaling", "parameters")
        rows = [
            [
                title + (f" x{len(group)}" if len(group) > 1 else ""),
                ", ".join(dict.fromkeys(f"{module.out_features} x {module.in_features}" for module in group)),
                ", ".join(dict.fromkeys(str(module.r) for module in group)),
                ", ".join(dict.fromkeys(f"{module.scaling:g}" for module in group)),
                f"{sum(module.parameters for module in group):,}",
            ]
            for title, group in groups.items()
        ]
        lines = [
            f"{what} {self.source} adapter {self.adapter}",
            f"as {self.method} adapter {self.output}",
            "",
            plain_table(columns, rows, right=columns[2:]),
            "",
            f"{len(self)} modules, {self.size:,} bytes",
        ]
        if self.others:
            lines.append(f"{len(self.others)} other tensors copied")
        lines += overwritten_line(self.overwritten, self.dry_run)
        return "\n".join(lines)
