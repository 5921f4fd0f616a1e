# SPDX-License-Identifier: Apache-2.0
"""What a merge did."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..checkpoints.output import overwritten_line
from ..reports import ModuleReport, PlainData, distinct, percent, shapes, share, some, total


@dataclass(frozen=True)
class MergedModule(PlainData):
    """What merging did to the weight of one module.

    Args:
        name (`str`):
            The name of the module in the model that the adapter was trained on; of an expert, that of the parameter
            and its number.
        tensor (`str`): The name of its weight in the checkpoint, or the names of the tensors that hold its rows.
        file (`str`): The file of the checkpoint that holds it.
        shape (`tuple[int, ...]`): The shape of the weight as stored.
        dtype (`str`): Its dtype, such as `"bfloat16"`.
        transposed (`bool`): Whether it is stored `(in, out)`, as `Conv1D` does.
        r (`int`): The number of row blocks.
        scaling (`float`): s = alpha / r.
        zeros_before (`int`): How many weights were zero (pruned).
        zeros_after (`int`): How many are zero.
        lost (`int`): How many were zero and are not: none, or the merge would have failed.
        gained (`int`): How many were not zero and are, by underflow or a factor of zero.
        non_finite (`int`): How many are infinite or NaN: none, or the merge would have failed.
    """

    json_properties = ("numel",)

    name: str
    tensor: str
    file: str
    shape: tuple[int, ...]
    dtype: str
    transposed: bool
    r: int
    scaling: float
    zeros_before: int
    zeros_after: int
    lost: int
    gained: int
    non_finite: int

    @property
    def numel(self) -> int:
        """How many weights there are."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class MergeReport(ModuleReport[MergedModule]):
    """What a merge did. `str()` gives a table, iteration the merged modules, `report[name]` one of them.

    Args:
        base (`str`): The folder of the base model.
        adapter (`str`): The folder of the adapter.
        output (`str`): The folder of the merged model.
        dry_run (`bool`): Whether nothing was written.
        modules (`Mapping[str, MergedModule]`): The merged modules, by name.
        replaced (`tuple[str, ...]`): The tensors that trained ones took the place of (biases, `modules_to_save`).
        copied (`int`): How many other tensors were copied unchanged.
        files (`tuple[str, ...]`): The weight files.
        carried (`tuple[str, ...]`): The other files that were copied.
        left_out (`tuple[str, ...]`): Weights in the base model's folder that were not copied: they are not merged.
        base_masks (`str`): How the base model's masks relate to those that the adapter was trained on.
        overwritten (`tuple[str, ...]`): The files of an old model in the output folder that gave way to the new one.
        size (`int`): How many bytes the merged model takes.
    """

    json_properties = ("numel", "zeros_before", "zeros_after", "lost", "gained")

    base: str
    adapter: str
    output: str
    dry_run: bool
    modules: Mapping[str, MergedModule]
    replaced: tuple[str, ...]
    copied: int
    files: tuple[str, ...]
    carried: tuple[str, ...]
    left_out: tuple[str, ...]
    base_masks: str
    overwritten: tuple[str, ...]
    size: int

    numel = total("numel")
    """How many weights an adapter was merged into."""

    zeros_before = total("zeros_before")
    """How many of them were zero (pruned)."""

    zeros_after = total("zeros_after")
    """How many of them are zero."""

    lost = total("lost")
    """How many of them were zero and are not: none."""

    gained = total("gained")
    """How many of them were not zero and are."""

    def __str__(self) -> str:
        what = "Would merge" if self.dry_run else "Merged"
        lines = [f"{what} {self.adapter}", f"into {self.base}", f"as {self.output}"]
        if self.modules:
            columns = ("module", "shape", "dtype", "r", "zero before", "zero after", "lost", "new zeros")
            lines += ["", self.module_table(columns, _cells, right=columns[3:]), ""]
        lines.append(
            f"{len(self)} modules merged, {self.numel:,} weights: "
            f"{percent(share(self.zeros_before, self.numel))} zero before, "
            f"{percent(share(self.zeros_after, self.numel))} after, {self.lost:,} zeros lost, "
            f"{self.gained:,} new zeros"
        )
        if self.replaced:
            lines.append(f"{len(self.replaced)} trained tensors written: {some(self.replaced, 3)}")
        lines.append(
            f"{self.copied} tensors and {len(self.carried)} files copied; {self.size:,} bytes in "
            f"{len(self.files)} weight files and these"
        )
        if self.left_out:
            lines.append(f"not copied, since they hold unmerged weights: {some(self.left_out, 3)}")
        lines.append(f"masks of the base: {self.base_masks}")
        lines += overwritten_line(self.overwritten, self.dry_run)
        return "\n".join(lines)


def _cells(group: list[MergedModule]) -> list[str]:
    numel = sum(module.numel for module in group)
    return [
        shapes(group),
        distinct(module.dtype for module in group),
        distinct(module.r for module in group),
        percent(share(sum(module.zeros_before for module in group), numel)),
        percent(share(sum(module.zeros_after for module in group), numel)),
        f"{sum(module.lost for module in group):,}",
        f"{sum(module.gained for module in group):,}",
    ]
