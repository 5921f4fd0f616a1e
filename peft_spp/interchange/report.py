# SPDX-License-Identifier: Apache-2.0
"""What an export or a conversion did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..checkpoints.output import overwritten_line
from ..reports import ModuleReport, PlainData, distinct


@dataclass(frozen=True)
class ExchangedModule(PlainData):
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
class InterchangeReport(ModuleReport[ExchangedModule]):
    """What an export or a conversion did. `str()` gives a table, iteration the modules, `report[name]` one of them.

    Args:
        adapter (`str`): The folder of the adapter that was read.
        output (`str`): The folder of the adapter that was written.
        source (`str`): The method of the one that was read.
        method (`str`): The method of the one that was written, as PEFT calls it.
        dry_run (`bool`): Whether nothing was written.
        modules (`Mapping[str, ExchangedModule]`): The adapted modules, by name.
        others (`tuple[str, ...]`): The other tensors, which were copied (`modules_to_save`).
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

    def __str__(self) -> str:
        what = "Would write" if self.dry_run else "Wrote"
        columns = ("module", "out x in", "r", "scaling", "parameters")
        lines = [
            f"{what} {self.source} adapter {self.adapter}",
            f"as {self.method} adapter {self.output}",
            "",
            self.module_table(columns, _cells, right=columns[2:]),
            "",
            f"{len(self)} modules, {self.size:,} bytes",
        ]
        if self.others:
            lines.append(f"{len(self.others)} other tensors copied")
        lines += overwritten_line(self.overwritten, self.dry_run)
        return "\n".join(lines)


def _cells(group: list[ExchangedModule]) -> list[str]:
    return [
        distinct(f"{module.out_features} x {module.in_features}" for module in group),
        distinct(module.r for module in group),
        distinct(f"{module.scaling:g}" for module in group),
        f"{sum(module.parameters for module in group):,}",
    ]
