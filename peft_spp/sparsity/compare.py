# SPDX-License-Identifier: Apache-2.0
"""What became of the zeros between two versions of a model or checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..reports import ModuleReport, PlainData, called, percent, plain_table, some, total
from .counting import count_pair
from .sources import Source, Weight, open_weights


WORST = 10
"""How many modules the table names."""


@dataclass(frozen=True)
class ModuleComparison(PlainData):
    """What became of the zeros of one linear layer.

    Args:
        name (`str`): The module's name in the model without adapters; empty if it is the model itself.
        shape (`tuple[int, ...]`): The shape of its weight as stored.
        numel (`int`): How many weights there are.
        zeros_before (`int`): How many were zero (pruned).
        zeros_after (`int`): How many are zero.
        lost (`int`): How many were zero and are not.
        gained (`int`): How many were not zero and are.
        negative_zeros (`int`): How many are `-0.0` after.
        non_finite (`int`): How many are infinite or NaN after.
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    zeros_before: int
    zeros_after: int
    lost: int
    gained: int
    negative_zeros: int
    non_finite: int

    @property
    def kept(self) -> bool:
        """Whether every zero is still zero."""
        return self.lost == 0


@dataclass(frozen=True)
class SparsityComparison(ModuleReport[ModuleComparison]):
    """What became of the zeros. `str()` gives a table, iteration the modules, `comparison[name]` one of them.

    Args:
        before (`str`): What was read first.
        after (`str`): What it was compared with.
        modules (`Mapping[str, ModuleComparison]`): The linear layers that both have in the same shape, by name.
        missing_before (`tuple[str, ...]`): Linear layers that only `after` has.
        missing_after (`tuple[str, ...]`): Linear layers that only `before` has.
        reshaped (`Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]`): Both shapes of those that differ in it.
        unreadable (`Mapping[str, str]`): Why zeros cannot be told in a linear layer (quantized, for example).
    """

    json_properties = ("kept", "zeros_before", "lost", "gained", "negative_zeros", "non_finite")

    before: str
    after: str
    modules: Mapping[str, ModuleComparison]
    missing_before: tuple[str, ...] = ()
    missing_after: tuple[str, ...] = ()
    reshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    unreadable: Mapping[str, str] = field(default_factory=dict)

    zeros_before = total("zeros_before")
    """How many weights were zero (pruned)."""

    lost = total("lost")
    """How many weights were zero and are not."""

    gained = total("gained")
    """How many weights were not zero and are."""

    negative_zeros = total("negative_zeros")
    """How many weights are `-0.0` after."""

    non_finite = total("non_finite")
    """How many weights are infinite or NaN after."""

    @property
    def complete(self) -> bool:
        """Whether every linear layer of either side could be compared, and there was one."""
        return bool(self.modules) and not (
            self.missing_before or self.missing_after or self.reshaped or self.unreadable
        )

    @property
    def kept(self) -> bool:
        """Whether every zero is known to be still zero: none is lost, and every layer could be compared."""
        return self.complete and self.lost == 0

    def worst(self, most: int = WORST) -> list[ModuleComparison]:
        """The modules that lost zeros, those that lost most first.

        Args:
            most (`int`, *optional*, defaults to 10): How many to return.

        Returns:
            `list[ModuleComparison]`: The modules.
        """
        losers = [module for module in self if module.lost]
        return sorted(losers, key=lambda module: module.lost, reverse=True)[:most]

    def table(self) -> str:
        """All compared modules as a table; where they are many, by kind.

        Returns:
            `str`: Its lines.
        """
        columns = ("module", "weights", "zeros before", "zeros after", "lost", "new zeros")
        attributes = ("numel", "zeros_before", "zeros_after", "lost", "gained")

        def cells(group: list[ModuleComparison]) -> list[str]:
            return [f"{sum(getattr(module, attribute) for module in group):,}" for attribute in attributes]

        return self.module_table(columns, cells, right=columns[1:])

    def __str__(self) -> str:
        share = f" ({percent(self.lost / self.zeros_before)})" if self.zeros_before else ""
        lines = [
            f"Zeros of {self.before} in {self.after}",
            f"{len(self)} linear layers compared: {self.lost:,} of {self.zeros_before:,} zeros lost{share}, "
            f"{self.gained:,} new zeros, {self.negative_zeros:,} negative zeros after"
            + (f", {self.non_finite:,} infinite or NaN after" if self.non_finite else ""),
        ]
        worst = self.worst()
        if worst:
            rows = [
                [called(one.name), f"{one.lost:,}", f"{one.zeros_before:,}", percent(one.lost / one.zeros_before)]
                for one in worst
            ]
            columns = ("module", "lost", "zeros before", "share lost")
            lines += ["", plain_table(columns, rows, right=columns[1:])]
            more = sum(1 for module in self if module.lost) - len(worst)
            lines += [f"and {more} more modules that lost zeros", ""] if more else [""]
        for title, names in (
            ("only before", [called(name) for name in self.missing_after]),
            ("only after", [called(name) for name in self.missing_before]),
            ("of a different shape", [f"{called(name)} {old} -> {new}" for name, (old, new) in self.reshaped.items()]),
            ("unreadable", [f"{called(name)} ({why})" for name, why in self.unreadable.items()]),
        ):
            if names:
                lines.append(f"{len(names)} {title}: {some(names)}")
        if not self.modules:
            lines.append("nothing was compared")
        lines.append("all zeros kept" if self.kept else "zeros not kept" if self.lost else "not known to be kept")
        return "\n".join(lines)


def _compare(before: Weight, after: Weight) -> ModuleComparison:
    with torch.no_grad():
        counts = count_pair(before.load(), after.load())
    return ModuleComparison(before.name, before.shape, math.prod(before.shape), gained=counts.gained, **vars(counts))


def compare_sparsity(
    before: Source,
    after: Source,
    *,
    modules: str | Sequence[str] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> SparsityComparison:
    """Compare two versions of a model: which places that were zero no longer are.

    Each layer is read from both, one layer at a time, and compared bit by bit: `0.0` and `-0.0` are zero, NaN is not.
    The two may be of different kinds, dtypes and devices. Which layers count is told in [`sparsity_report`]. Whether a
    weight is stored `(out, in)` or `(in, out)` does not matter here. Layers are matched by name: transformers fuses
    the experts of some mixtures (Mixtral) in memory and writes them one by one, so compare model with model or folder
    with folder there; what does not match is listed as missing.

    Args:
        before (`nn.Module`, `Mapping[str, torch.Tensor]`, `str` or `PathLike`):
            The pruned model: anything that [`sparsity_report`] reads.
        after (`nn.Module`, `Mapping[str, torch.Tensor]`, `str` or `PathLike`): What became of it.
        modules (`str` or `Sequence[str]`, *optional*):
            Which modules to compare: a regular expression for the whole name, or a list of names or their ends.
        progress (`Callable[[int, int], object]`, *optional*): Called with how many were read and how many there are.

    Returns:
        `SparsityComparison`: The data, with a table as `str()`.

    Raises:
        TypeError: If a source is of another kind.
        FileNotFoundError: If there is nothing at a path.
        ValueError: If a source cannot be read; the message names the file or module.
    """
    old, new = open_weights(before, modules=modules), open_weights(after, modules=modules)
    compared: dict[str, ModuleComparison] = {}
    missing_before, missing_after = [], []
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    unreadable: dict[str, str] = {}
    names = dict.fromkeys([*old.linear, *new.linear])
    for done, name in enumerate(names, 1):
        # One side may leave out by name what the other knows to be a linear layer by its module.
        one, other = old.found.get(name), new.found.get(name)
        if other is None:
            missing_after.append(name)
        elif one is None:
            missing_before.append(name)
        elif one.unreadable or other.unreadable:
            side = "before" if one.unreadable else "after"
            unreadable[name] = f"{one.unreadable or other.unreadable}, {side}"
        elif one.shape != other.shape:
            reshaped[name] = (one.shape, other.shape)
        else:
            compared[name] = _compare(one, other)
        if progress is not None:
            progress(done, len(names))
    return SparsityComparison(
        old.label, new.label, compared, tuple(missing_before), tuple(missing_after), reshaped, unreadable
    )
