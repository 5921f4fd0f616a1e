# SPDX-License-Identifier: Apache-2.0
"""What compressing or decompressing a checkpoint did."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..checkpoints.output import overwritten_line
from ..reports import ModuleReport, PlainData, distinct, percent, shapes, share, some, total


@dataclass(frozen=True)
class CompressedModule(PlainData):
    """What became of one linear layer.

    Args:
        name (`str`): The name of the module.
        tensor (`str`): The name of its weight in the checkpoint.
        file (`str`): The file of the checkpoint that holds it.
        shape (`tuple[int, ...]`): The shape of the weight.
        dtype (`str`): Its dtype, such as `"bfloat16"`.
        stored (`int`): How many of its values are not `+0.0`.
        dense_bytes (`int`): The bytes of the dense weight.
        compressed_bytes (`int`): The bytes of its values and its bitmask.
    """

    name: str
    tensor: str
    file: str
    shape: tuple[int, ...]
    dtype: str
    stored: int
    dense_bytes: int
    compressed_bytes: int

    @property
    def numel(self) -> int:
        """How many weights there are."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class CompressionReport(ModuleReport[CompressedModule]):
    """What compressing or decompressing did. `str()` gives a table, iteration the layers that changed.

    Args:
        model (`str`): The folder of the model.
        output (`str`): The folder that was written.
        action (`str`): `"compress"` or `"decompress"`.
        dry_run (`bool`): Whether nothing was written.
        modules (`Mapping[str, CompressedModule]`): The layers that changed, by name.
        kept (`Mapping[str, str]`): The linear layers and fused experts that stay dense, and why.
        files (`tuple[str, ...]`): The weight files that were written.
        carried (`tuple[str, ...]`): The other files.
        left_out (`tuple[str, ...]`): Weights in the model's folder that were not copied.
        overwritten (`tuple[str, ...]`): The files of an old model in the output folder that gave way to the new one.
        bytes_before (`int`): The bytes of all tensors before.
        bytes_after (`int`): The bytes of all tensors after.
    """

    json_properties: ClassVar[tuple[str, ...]] = ("numel", "stored")

    model: str
    output: str
    action: str
    dry_run: bool
    modules: Mapping[str, CompressedModule]
    kept: Mapping[str, str]
    files: tuple[str, ...]
    carried: tuple[str, ...]
    left_out: tuple[str, ...]
    overwritten: tuple[str, ...]
    bytes_before: int
    bytes_after: int

    numel = total("numel")
    stored = total("stored")

    def __str__(self) -> str:
        verb = "ompress" if self.action == "compress" else "ecompress"
        first = self.action[0]
        lines = [f"Would {first}{verb} {self.model}" if self.dry_run else f"{first.upper()}{verb}ed {self.model}"]
        lines.append(f"as {self.output}")
        if self.modules:
            columns = ("module", "shape", "dtype", "zeros", "dense bytes", "compressed", "share")
            lines += ["", self.module_table(columns, _cells, right=columns[3:]), ""]
        # of an old format, biases and norms may have been compressed too
        what = "linear layers" if self.action == "compress" else "tensors"
        lines.append(
            f"{len(self)} {what} {self.action}ed; all tensors took {self.bytes_before:,} bytes and take "
            f"{self.bytes_after:,} ({percent(share(self.bytes_after, self.bytes_before))})"
        )
        reasons: dict[str, list[str]] = {}
        for name, reason in self.kept.items():
            reasons.setdefault("too few zeros" if reason.endswith("% zeros") else reason, []).append(name)
        lines += [f"{len(names)} stay dense ({reason}): {some(names, 3)}" for reason, names in reasons.items()]
        if self.left_out:
            lines.append(f"not copied, since they are another model's or format's: {some(self.left_out, 3)}")
        lines += overwritten_line(self.overwritten, self.dry_run)
        return "\n".join(lines)


def _cells(group: list[CompressedModule]) -> list[str]:
    dense, compressed = (sum(getattr(one, name) for one in group) for name in ("dense_bytes", "compressed_bytes"))
    numel = sum(one.numel for one in group)
    return [
        shapes(group),
        distinct(one.dtype for one in group),
        percent(share(numel - sum(one.stored for one in group), numel)),
        f"{dense:,}",
        f"{compressed:,}",
        percent(share(compressed, dense)),
    ]
