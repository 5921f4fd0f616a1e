# SPDX-License-Identifier: Apache-2.0
"""What a merge did."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..checkpoints.output import overwritten_line
from ..sparsity.by_module import ByModule
from ..sparsity.table import MAX_ROWS, kind_of, percent, plain_table, some


@dataclass(frozen=True)
class MergedModule:
    """What merging did to the weight of one module.

    Args:
        name (`str`): The name of the module in the model that the adapter was trained on.
        tensor (`str`): The name of its weight in the checkpoint.
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

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data for JSON.

        Returns:
            `dict[str, Any]`: Numbers, strings, lists and dicts only.
        """
        return {**vars(self), "shape": list(self.shape), "numel": self.numel}


@dataclass(frozen=True)
class MergeReport(ByModule[MergedModule]):
    """What a merge did. `str()` gives a table, iteration the merged modules, `report[name]` one of them.

    Args:
        base (`str`): The folder of the base model.
        adapter (`str`): The folder of the adapter.
        output (`str`): The folder of the merged model.
        dry_run (`bool`): Whether nothing was written.
        modules (`Mapping[str, MergedModule]`): The merged modules, by name.
        replaced (`tuple[str, ...]`): The tensors that trained ones took the place of (biases, `modules_to_save`).
        copied (`int`): How many other tensors were copied as they were.
        files (`tuple[str, ...]`): The weight files.
        carried (`tuple[str, ...]`): The other files that were copied.
        left_out (`tuple[str, ...]`): Weights in the base model's folder that were not copied: they are not merged.
        base_masks (`str`): How the base model's masks relate to those that the adapter was trained on.
        overwritten (`tuple[str, ...]`): The files of an old model in the output folder that gave way to the new one.
        size (`int`): How many bytes the merged model takes.
    """

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

    @property
    def numel(self) -> int:
        """How many weights an adapter was merged into."""
        return sum(module.numel for module in self)

    @property
    def zeros_before(self) -> int:
        """How many of them were zero (pruned)."""
        return sum(module.zeros_before for module in self)

    @property
    def zeros_after(self) -> int:
        """How many of them are zero."""
        return sum(module.zeros_after for module in self)

    @property
    def lost(self) -> int:
        """How many of them were zero and are not: none."""
        return sum(module.lost for module in self)

    @property
    def gained(self) -> int:
        """How many of them were not zero and are."""
        return sum(module.gained for module in self)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data for JSON.

        Returns:
            `dict[str, Any]`: Numbers, strings, lists and dicts only.
        """
        return {
            "base": self.base,
            "adapter": self.adapter,
            "output": self.output,
            "dry_run": self.dry_run,
            "numel": self.numel,
            "zeros_before": self.zeros_before,
            "zeros_after": self.zeros_after,
            "lost": self.lost,
            "gained": self.gained,
            "modules": [module.to_dict() for module in self],
            "replaced": list(self.replaced),
            "copied": self.copied,
            "files": list(self.files),
            "carried": list(self.carried),
            "left_out": list(self.left_out),
            "base_masks": self.base_masks,
            "overwritten": list(self.overwritten),
            "size": self.size,
        }

    def __str__(self) -> str:
        what = "Would merge" if self.dry_run else "Merged"
        lines = [f"{what} {self.adapter}", f"into {self.base}", f"as {self.output}"]
        if self.modules:
            grouped = len(self.modules) > MAX_ROWS
            groups: dict[str, list[MergedModule]] = {}
            for module in self:
                groups.setdefault(kind_of(module.name) if grouped else module.name, []).append(module)
            rows = [
                [title + (f" x{len(group)}" if grouped else ""), *_cells(group)] for title, group in groups.items()
            ]
            columns = ("module", "shape", "dtype", "r", "zero before", "zero after", "lost", "new zeros")
            lines += ["", plain_table(columns, rows, right=columns[3:]), ""]
        lines.append(
            f"{len(self)} modules merged, {self.numel:,} weights: "
            f"{percent(_share(self.zeros_before, self.numel))} zero before, "
            f"{percent(_share(self.zeros_after, self.numel))} after, {self.lost:,} zeros lost, "
            f"{self.gained:,} new zeros"
        )
        if self.replaced:
            lines.append(f"{len(self.replaced)} trained tensors written: {some(self.replaced, 3)}")
        lines.append(
            f"{self.copied} tensors and {len(self.carried)} files copied; {self.size:,} bytes in "
            f"{len(self.files)} weight files and these"
        )
        if self.left_out:
            lines.append(f"not copied, since they would be unmerged: {some(self.left_out, 3)}")
        lines.append(f"masks of the base: {self.base_masks}")
        lines += overwritten_line(self.overwritten, self.dry_run)
        return "\n".join(lines)


def _cells(group: list[MergedModule]) -> list[str]:
    shapes = dict.fromkeys(
        " x ".join(map(str, module.shape)) + (" (in, out)" if module.transposed else "") for module in group
    )
    numel = sum(module.numel for module in group)
    return [
        next(iter(shapes)) if len(shapes) == 1 else f"{len(shapes)} shapes",
        ", ".join(dict.fromkeys(module.dtype for module in group)),
        ", ".join(dict.fromkeys(str(module.r) for module in group)),
        percent(_share(sum(module.zeros_before for module in group), numel)),
        percent(_share(sum(module.zeros_after for module in group), numel)),
        f"{sum(module.lost for module in group):,}",
        f"{sum(module.gained for module in group):,}",
    ]


def _share(count: int, numel: int) -> float:
    return count / numel if numel else 0.0
