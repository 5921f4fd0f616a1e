# SPDX-License-Identifier: Apache-2.0
"""How sparse each linear layer of a model or checkpoint is, and in which pattern."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..reports import ModuleReport, PlainData, by_reason, distinct, percent, shapes, share, some, span, total
from .counting import count
from .pattern import NMPattern, parse_patterns, pattern_name
from .sources import Source, Weight, open_weights


@dataclass(frozen=True)
class ModuleSparsity(PlainData):
    """How sparse one linear layer is.

    Args:
        name (`str`): The module's name in the model without adapters; empty if it is the model itself.
        shape (`tuple[int, ...]`):
            The shape as stored: `(out, in)`, or `(in, out)` if `transposed`; 3-D with the experts of a mixture first.
        dtype (`str`): The dtype, such as `"bfloat16"`.
        transposed (`bool`): Whether the weight is stored `(in, out)`, as `Conv1D` does.
        numel (`int`): How many weights there are.
        zeros (`int`): How many are zero, `-0.0` included.
        negative_zeros (`int`): How many are `-0.0`.
        non_finite (`int`): How many are infinite or NaN.
        fullest_group (`Mapping[int, int]`):
            For each group size M looked for, the largest number of non-zeros in a group of M consecutive inputs.
        pattern (`str`): The tightest N:M found of those looked for, else `"unstructured"` or `"dense"`.
    """

    json_keys = (
        "name",
        "shape",
        "dtype",
        "transposed",
        "numel",
        "zeros",
        "sparsity",
        "negative_zeros",
        "non_finite",
        "fullest_group",
        "pattern",
    )

    name: str
    shape: tuple[int, ...]
    dtype: str
    transposed: bool
    numel: int
    zeros: int
    negative_zeros: int
    non_finite: int
    fullest_group: Mapping[int, int]
    pattern: str

    @property
    def sparsity(self) -> float:
        """The share of weights that are zero, between 0 and 1."""
        return share(self.zeros, self.numel)

    @property
    def in_features(self) -> int:
        """The number of inputs."""
        return self.shape[-2 if self.transposed else -1]

    @property
    def out_features(self) -> int:
        """The number of outputs (of each expert)."""
        return self.shape[-1 if self.transposed else -2]

    def satisfies(self, pattern: str | NMPattern) -> bool:
        """Whether every group of M consecutive inputs holds at most N non-zeros.

        Args:
            pattern (`str` or `NMPattern`): A pattern whose M is that of one of the report's patterns.

        Returns:
            `bool`: Whether the weight holds it.

        Raises:
            ValueError: If the report did not look for groups of M.
        """
        pattern = NMPattern.parse(pattern)
        if pattern.m not in self.fullest_group:
            raise ValueError(f"the report has no counts for {pattern}: pass patterns=({str(pattern)!r}, ...)")
        return self.fullest_group[pattern.m] <= pattern.n


@dataclass(frozen=True)
class SparsityReport(ModuleReport[ModuleSparsity]):
    """How sparse a model or checkpoint is. `str()` gives a table, iteration the modules, `report[name]` one of them.

    Args:
        source (`str`): What was read.
        patterns (`tuple[NMPattern, ...]`): The patterns looked for, the tightest first.
        modules (`Mapping[str, ModuleSparsity]`): The linear layers, by name.
        skipped (`Mapping[str, str]`):
            Why each other weight of two or more dimensions was not counted: `"embedding"`, `"norm"`, `"head"`,
            `"router"`, `"adapter"`, `"not a linear layer's weight"`, or `"unreadable: ..."` with its dtype or type.
    """

    json_properties = ("total_sparsity", "numel", "zeros", "negative_zeros", "non_finite")

    source: str
    patterns: tuple[NMPattern, ...]
    modules: Mapping[str, ModuleSparsity]
    skipped: Mapping[str, str]

    numel = total("numel")
    """How many weights were counted."""

    zeros = total("zeros")
    """How many of them are zero."""

    negative_zeros = total("negative_zeros")
    """How many of them are `-0.0`."""

    non_finite = total("non_finite")
    """How many of them are infinite or NaN."""

    @property
    def total_sparsity(self) -> float:
        """The share of counted weights that are zero, between 0 and 1."""
        return share(self.zeros, self.numel)

    def all_satisfy(self, pattern: str | NMPattern) -> bool:
        """Whether every counted module holds an N:M pattern.

        Args:
            pattern (`str` or `NMPattern`): A pattern whose M is that of one of the report's patterns.

        Returns:
            `bool`: Whether all do; `False` if no module was counted.

        Raises:
            ValueError: If the report did not look for groups of M.
        """
        return bool(self.modules) and all([module.satisfies(pattern) for module in self])

    def __str__(self) -> str:
        lines = [f"Sparsity of {self.source}"]
        if self.modules:
            extra = [
                (title, attribute)
                for title, attribute in (("-0.0", "negative_zeros"), ("non-finite", "non_finite"))
                if getattr(self, attribute)
            ]
            titles = [title for title, _ in extra]
            columns = ("module", "shape", "dtype", "sparsity", "pattern", *titles)

            def cells(group: list[ModuleSparsity]) -> list[str]:
                return _cells(group) + [f"{sum(getattr(one, name) for one in group):,}" for _, name in extra]

            lines += ["", self.module_table(columns, cells, right=("sparsity", *titles)), ""]
        lines.append(
            f"{len(self)} linear layers, {self.numel:,} weights, {percent(self.total_sparsity)} zero"
            + (f", {self.negative_zeros:,} of them -0.0" if self.negative_zeros else "")
            + (f"; {self.non_finite:,} infinite or NaN" if self.non_finite else "")
        )
        for reason, names in by_reason(self.skipped).items():
            lines.append(f"not counted, {reason}: {some(names, 3 if len(names) <= 3 else 1)}")
        return "\n".join(lines)


def _cells(group: list[ModuleSparsity]) -> list[str]:
    """Shape, dtype, sparsity and pattern of one module or of all of a kind."""
    patterns = Counter(module.pattern for module in group)
    return [
        shapes(group),
        distinct(module.dtype for module in group),
        span((module.sparsity for module in group), percent),
        ", ".join(pattern if len(patterns) == 1 else f"{pattern} x{times}" for pattern, times in patterns.items()),
    ]


def module_sparsity(weight: Weight, tensor: torch.Tensor, wanted: tuple[NMPattern, ...]) -> ModuleSparsity:
    """How sparse one weight is."""
    with torch.no_grad():
        counts = count(tensor, transposed=weight.transposed, group_sizes=sorted({pattern.m for pattern in wanted}))
    numel = tensor.numel()
    inputs = weight.shape[-2 if weight.transposed else -1]
    return ModuleSparsity(
        name=weight.name,
        shape=weight.shape,
        dtype=weight.dtype,
        transposed=weight.transposed,
        numel=numel,
        zeros=counts.zeros,
        negative_zeros=counts.negative_zeros,
        non_finite=counts.non_finite,
        fullest_group=counts.fullest,
        pattern=pattern_name(wanted, counts.zeros, numel, inputs, counts.fullest),
    )


def sparsity_report(
    source: Source,
    *,
    patterns: str | NMPattern | Iterable[str | NMPattern] = ("2:4", "4:8", "2:8"),
    modules: str | Sequence[str] | None = None,
    conv1d: bool | str | Sequence[str] | None = None,
) -> SparsityReport:
    """Report how sparse each linear layer of a model or checkpoint is.

    Tensors are read one at a time, so a checkpoint needs no more memory than its largest tensor (and 64 MB).

    What counts are the weights of linear layers: in a model, those of `nn.Linear` and of transformers' `Conv1D`; in a
    state dict or checkpoint, 2-D floating tensors named `*.weight` that are not named like an embedding or a norm; in
    both, fused 3-D expert weights. Heads (`lm_head`, `score`, `classifier`, ...) and the routers of mixtures are
    linear layers that pruning leaves alone: they count only if `modules` asks for them. Names are those of the model
    without PEFT's wrappers, and adapters do not count: of a `PeftModel`, the base layers are reported as
    stored, whatever an unmerged adapter would add to them. `skipped` lists what was not counted, and why.

    The pattern of a layer is `"dense"` if less than 1 % of it is zero; else the tightest of `patterns` that every
    group of consecutive inputs holds (2:8 before 2:4 before 4:8); else `"unstructured"`. If the number of inputs is
    not a multiple of M, the last, incomplete group must hold at most N non-zeros too.

    Args:
        source (`nn.Module`, `Mapping[str, torch.Tensor]`, `str` or `PathLike`):
            A model (also a `PeftModel`), a state dict, a safetensors file, or a folder with `model.safetensors`,
            shards and their `model.safetensors.index.json`, or other `*.safetensors`.
        patterns (`str`, `NMPattern` or an iterable of them, *optional*, defaults to `("2:4", "4:8", "2:8")`):
            The N:M patterns to look for.
        modules (`str` or `Sequence[str]`, *optional*):
            Which modules to report, as PEFT's `target_modules`: a regular expression for the whole name, or a list of
            names or their ends (`["q_proj", "v_proj"]`).
        conv1d (`bool`, `str` or `Sequence[str]`, *optional*):
            Which weights are stored `(in, out)`, in the same way, or `True` for all. It is only needed where neither
            the module, nor the `model_type` in `config.json`, nor the length of the biases tells.

    Returns:
        `SparsityReport`: The data, with a table as `str()`.

    Raises:
        TypeError: If `source` is of another kind.
        FileNotFoundError: If there is nothing at the path.
        ValueError: If a pattern is malformed, nothing matches `modules`, a weight is on the meta device, or a file
            cannot be read (not safetensors, truncated, missing or outside the folder); the message names the file or
            module.
    """
    wanted = parse_patterns(patterns)
    weights = open_weights(source, modules=modules, conv1d=conv1d)
    readable = {name: weight for name, weight in weights.linear.items() if weight.unreadable is None}
    found = {name: module_sparsity(weight, weight.load(), wanted) for name, weight in readable.items()}
    return SparsityReport(weights.label, wanted, found, weights.skipped)
