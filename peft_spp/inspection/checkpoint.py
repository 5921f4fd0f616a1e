# SPDX-License-Identifier: Apache-2.0
"""How sparse the layers of a checkpoint are, how large, and where their zeros sit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..reports import ModuleReport, PlainData, by_reason, distinct, percent, shapes, share, some, span, total
from ..sparsity import ModuleSparsity, NMPattern
from ..sparsity.bits import CHUNK_ELEMENTS, look_at
from ..sparsity.pattern import parse_patterns
from ..sparsity.report import module_sparsity
from ..sparsity.sources import Source, Weight, open_weights


@dataclass(frozen=True)
class ModuleInspection(PlainData):
    """What one linear layer looks like.

    Args:
        sparsity (`ModuleSparsity`): Its shape, dtype, zeros and pattern.
        size (`int`): The bytes of its weight as it is stored: of a compressed one, of values and bitmask.
        least (`float`): The share of zeros in the output (row) that has the fewest.
        most (`float`): The share of zeros in the output that has the most.
        empty_outputs (`int`): How many outputs have no weight but zeros.
        empty_inputs (`int`): How many inputs (columns) have no weight but zeros.
    """

    sparsity: ModuleSparsity
    size: int
    least: float
    most: float
    empty_outputs: int
    empty_inputs: int

    @property
    def name(self) -> str:
        """The name of the module."""
        return self.sparsity.name

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.sparsity.to_dict(),
            "size": self.size,
            "least_sparse_output": self.least,
            "most_sparse_output": self.most,
            "empty_outputs": self.empty_outputs,
            "empty_inputs": self.empty_inputs,
        }


@dataclass(frozen=True)
class CheckpointInspection(ModuleReport[ModuleInspection]):
    """What a checkpoint looks like. `str()` gives a table, iteration the layers, `inspection[name]` one of them.

    Args:
        source (`str`): What was read.
        modules (`Mapping[str, ModuleInspection]`): The linear layers, by name.
        skipped (`Mapping[str, str]`): Why each other weight of two or more dimensions was not counted.
        weights (`Mapping[str, Weight]`): Where the weights of the layers are, by name.
    """

    json_keys = ("source", "kind", "total_sparsity", "numel", "zeros", "size", "modules", "skipped")
    kind = "checkpoint"

    source: str
    modules: Mapping[str, ModuleInspection]
    skipped: Mapping[str, str]
    weights: Mapping[str, Weight]

    numel = total("sparsity.numel")
    """How many weights were counted."""

    zeros = total("sparsity.zeros")
    """How many of them are zero."""

    size = total("size")
    """The bytes of them."""

    @property
    def total_sparsity(self) -> float:
        """The share of counted weights that are zero, between 0 and 1."""
        return share(self.zeros, self.numel)

    def nonzero(self, name: str) -> Tensor:
        """Read which weights of a layer are not zero.

        Args:
            name (`str`): The name of the layer.

        Returns:
            `torch.Tensor`: Boolean, shape `(out, in)`; of the first expert, where there are many in one weight.

        Raises:
            ValueError: If there is no such layer.
        """
        if name not in self:
            raise ValueError(f"{self.source} has no linear layer {name!r}; it has {some(list(self.modules), 3)}")
        weight = self.weights[name]
        return look_at(next(_matrices(weight.load(), weight.transposed)).contiguous()).nonzero

    def __str__(self) -> str:
        lines = [f"Linear layers of {self.source}"]
        if self.modules:
            columns = (
                "module",
                "shape",
                "dtype",
                "pattern",
                "size",
                "sparsity",
                "of the outputs",
                "empty outputs",
                "empty inputs",
            )
            lines += ["", self.module_table(columns, _cells, right=columns[4:]), ""]
        lines.append(
            f"{len(self)} linear layers, {self.numel:,} weights in {_bytes(self.size)}, "
            f"{percent(self.total_sparsity)} zero"
        )
        lines += [f"not counted, {reason}: {some(names, 3)}" for reason, names in by_reason(self.skipped).items()]
        return "\n".join(lines)


def inspect_checkpoint(
    source: Source,
    *,
    patterns: str | NMPattern | Iterable[str | NMPattern] = ("2:4", "4:8", "2:8"),
    modules: str | Sequence[str] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> CheckpointInspection:
    """Look into a checkpoint, one tensor at a time.

    Args:
        source (`nn.Module`, `Mapping[str, torch.Tensor]`, `str` or `PathLike`): See [`sparsity_report`].
        patterns (`str`, `NMPattern` or an iterable of them, *optional*): The N:M patterns to look for.
        modules (`str` or `Sequence[str]`, *optional*):
            Which modules to look at: a regular expression for the whole name, or a list of names or their ends.
        progress (`Callable[[int, int], object]`, *optional*): Called with how many were read and how many there are.

    Returns:
        `CheckpointInspection`: The data, with a table as `str()`.

    Raises:
        FileNotFoundError: If there is nothing at the path.
        ValueError: If a pattern is malformed, nothing matches `modules`, or a file cannot be read.
    """
    wanted = parse_patterns(patterns)
    weights = open_weights(source, modules=modules)
    readable = {name: weight for name, weight in weights.linear.items() if weight.unreadable is None}
    found = {}
    for name, weight in readable.items():
        found[name] = _inspect(weight, wanted)
        if progress is not None:
            progress(len(found), len(readable))
    return CheckpointInspection(weights.label, found, weights.skipped, readable)


@torch.no_grad()
def _inspect(weight: Weight, wanted: tuple[NMPattern, ...]) -> ModuleInspection:
    tensor = weight.load()
    least, most, empty_outputs, empty_inputs = 1.0, 0.0, 0, 0
    for matrix in _matrices(tensor, weight.transposed):
        outputs, inputs = matrix.shape
        if not matrix.numel():
            continue
        used = torch.zeros(inputs, dtype=torch.bool, device=matrix.device)
        step = max(1, CHUNK_ELEMENTS // inputs)
        for start in range(0, outputs, step):
            nonzero = look_at(matrix[start : start + step].contiguous()).nonzero
            used |= nonzero.any(dim=0)
            kept = nonzero.sum(dim=1)
            least = min(least, 1 - int(kept.max()) / inputs)
            most = max(most, 1 - int(kept.min()) / inputs)
            empty_outputs += int((kept == 0).sum())
        empty_inputs += inputs - int(used.sum())
    sparsity = module_sparsity(weight, tensor, wanted)
    size = tensor.nbytes if weight.size is None else weight.size
    return ModuleInspection(sparsity, size, min(least, most), most, empty_outputs, empty_inputs)


def _matrices(tensor: Tensor, transposed: bool) -> Iterator[Tensor]:
    """The weights `(out, in)` that a weight consists of: one for each expert of a mixture."""
    for matrix in [tensor] if tensor.dim() == 2 else tensor.unbind(0):
        yield matrix.detach().T if transposed else matrix.detach()


def _cells(group: list[ModuleInspection]) -> list[str]:
    all_of = [module.sparsity for module in group]
    return [
        shapes(all_of),
        distinct(one.dtype for one in all_of),
        distinct(one.pattern for one in all_of),
        _bytes(sum(module.size for module in group)),
        span((one.sparsity for one in all_of), percent),
        span([min(module.least for module in group), max(module.most for module in group)], percent),
        f"{sum(module.empty_outputs for module in group):,}",
        f"{sum(module.empty_inputs for module in group):,}",
    ]


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
