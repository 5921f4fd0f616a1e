# SPDX-License-Identifier: Apache-2.0
"""What pruning a checkpoint did."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..checkpoints.output import overwritten_line
from ..reports import ModuleReport, PlainData, distinct, percent, shapes, some, total


@dataclass(frozen=True)
class PrunedModule(PlainData):
    """What pruning did to the weight of one layer.

    Args:
        name (`str`): The name of the layer.
        tensor (`str`): The name of its weight in the checkpoint.
        file (`str`): The file of the checkpoint that holds it.
        shape (`tuple[int, ...]`): The shape of the weight as stored.
        dtype (`str`): Its dtype, such as `"bfloat16"`.
        zeros_before (`int`): How many weights were zero.
        zeros_after (`int` or `None`): How many are zero; `None` after a dry run.
    """

    json_properties = ("numel",)

    name: str
    tensor: str
    file: str
    shape: tuple[int, ...]
    dtype: str
    zeros_before: int
    zeros_after: int | None

    @property
    def numel(self) -> int:
        """How many weights there are."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class PruneReport(ModuleReport[PrunedModule]):
    """What pruning did. `str()` gives a table, iteration the pruned layers, `report[name]` one of them.

    Args:
        model (`str`): The folder of the model.
        output (`str`): The folder of the pruned model.
        dry_run (`bool`): Whether nothing was pruned and written.
        settings (`Mapping[str, Any]`): The method and all that it was given, as plain data.
        modules (`Mapping[str, PrunedModule]`): The pruned layers, by name.
        left_dense (`tuple[str, ...]`): The linear layers that were not pruned.
        files (`tuple[str, ...]`): The weight files.
        carried (`tuple[str, ...]`): The other files that were copied.
        left_out (`tuple[str, ...]`): Weights in the model's folder that were not copied: they are not pruned.
        overwritten (`tuple[str, ...]`): The files of an old model in the output folder that gave way to the new one.
        size (`int`): How many bytes the pruned model takes.
    """

    json_properties = ("numel", "zeros_before", "zeros_after", "sparsity")

    model: str
    output: str
    dry_run: bool
    settings: Mapping[str, Any]
    modules: Mapping[str, PrunedModule]
    left_dense: tuple[str, ...]
    files: tuple[str, ...]
    carried: tuple[str, ...]
    left_out: tuple[str, ...]
    overwritten: tuple[str, ...]
    size: int

    numel = total("numel")
    """How many weights the pruned layers have."""

    zeros_before = total("zeros_before")
    """How many of them were zero."""

    @property
    def zeros_after(self) -> int | None:
        """How many of them are zero; `None` after a dry run."""
        return None if self.dry_run else sum(module.zeros_after or 0 for module in self)

    @property
    def sparsity(self) -> float | None:
        """The share of them that is zero, between 0 and 1; `None` after a dry run."""
        return None if self.zeros_after is None else self.zeros_after / self.numel

    def table(self) -> str:
        """The pruned layers as a table; where they are many, by kind.

        Returns:
            `str`: Its lines.
        """
        columns = ("layer", "shape", "dtype", "zero before", "zero after")
        return self.module_table(columns, self._cells, right=columns[3:])

    def _cells(self, group: list[PrunedModule]) -> list[str]:
        numel = sum(module.numel for module in group)
        after = "" if self.dry_run else percent(sum(module.zeros_after or 0 for module in group) / numel)
        return [
            shapes(group),
            distinct(module.dtype for module in group),
            percent(sum(module.zeros_before for module in group) / numel),
            after,
        ]

    def __str__(self) -> str:
        what = "Would prune" if self.dry_run else "Pruned"
        lines = [f"{what} {self.model}", f"as {self.output}", f"with {describe(self.settings)}", "", self.table(), ""]
        lines.append(
            f"{len(self)} layers, {self.numel:,} weights: {percent(self.zeros_before / self.numel)} zero before"
            + ("" if self.sparsity is None else f", {percent(self.sparsity)} after")
        )
        if self.left_dense:
            lines.append(f"left dense: {some(self.left_dense, 3)}")
        if self.left_out:
            lines.append(f"not copied, since they hold unpruned weights: {some(self.left_out, 3)}")
        lines += overwritten_line(self.overwritten, self.dry_run)
        return "\n".join(lines)


def describe(settings: Mapping[str, Any]) -> str:
    """The settings in one line."""
    return ", ".join(
        str(value) if name == "method" else f"{name}={value}" for name, value in settings.items() if value is not None
    )
