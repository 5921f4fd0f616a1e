# SPDX-License-Identifier: Apache-2.0
"""What training has made of an adapter: how much its factors change the weights, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.checkpoint import OTHER_WEIGHTS, read_checkpoint
from ..checkpoints.hub import local_folder
from ..checkpoints.own_files import CONFIG
from ..functional import Factors, expand_row_blocks, row_block_index
from ..merge.adapter import AdaptedModule, load_adapter, named_base
from ..merge.parameters import AdaptedParameter, read_parameters
from ..merge.plan import plan_merge
from ..merge.run import count_zeros
from ..reports import ModuleReport, PlainData, distinct, percent, shapes, share, some, span
from ..sparsity import MaskRecord
from ..sparsity.base_masks import BaseRecord
from ..sparsity.counting import PairCounts


@dataclass(frozen=True)
class AdaptedModuleInspection(PlainData):
    """What an adapter does to one module, whose weight becomes W ⊙ (1 + D) with D = s · P(A) ⊙ B.

    Args:
        name (`str`): The name of the module in the base model; of an expert, that of the parameter and its number.
        shape (`tuple[int, int]`): The number of outputs and of inputs.
        r (`int`): The number of row blocks.
        scaling (`float`): s = alpha / r.
        change (`float`): The root mean square of D: how much a weight changes, relative to itself.
        largest (`float`): The largest |D|.
        norm_A (`float`): ‖A‖.
        norm_B (`float`): ‖B‖, zero as long as nothing was trained.
        mask (`MaskRecord`, *optional*):
            The mask of the weight that it was trained on; of an expert, that of its stack.
        zeros (`int`, *optional*): How many merged weights are zero, if a base model was given.
    """

    name: str
    shape: tuple[int, int]
    r: int
    scaling: float
    change: float
    largest: float
    norm_A: float
    norm_B: float
    mask: MaskRecord | None
    zeros: int | None = None


@dataclass(frozen=True)
class AdapterInspection(ModuleReport[AdaptedModuleInspection]):
    """The content of an adapter. `str()` gives a table, iteration the modules, `inspection[name]` one of them.

    Args:
        source (`str`): The folder of the adapter.
        base_model (`str`, *optional*): The base model that it names.
        quantization (`str`, *optional*): How that was quantized in training.
        modules (`Mapping[str, AdaptedModuleInspection]`): The adapted modules, by name.
        trained (`tuple[str, ...]`): Tensors that take the place of the model's own: biases, `modules_to_save`.
        factors (`Mapping[str, AdaptedModule]`): Where the factors of the modules are, by name.
    """

    json_keys = ("source", "kind", "base_model", "quantization", "change", "modules", "trained")
    kind = "adapter"

    source: str
    base_model: str | None
    quantization: str | None
    modules: Mapping[str, AdaptedModuleInspection]
    trained: tuple[str, ...]
    factors: Mapping[str, AdaptedModule]

    @property
    def change(self) -> float:
        """The root mean square of D over all adapted weights."""
        numel = sum(math.prod(module.shape) for module in self)
        return math.sqrt(sum(module.change**2 * math.prod(module.shape) for module in self) / numel) if numel else 0.0

    def relative_change(self, name: str) -> Tensor:
        """Compute D, the relative change of each weight of a module.

        Args:
            name (`str`): The name of the module.

        Returns:
            `torch.Tensor`: float32, shape `(out, in)`.

        Raises:
            ValueError: If the adapter has no such module.
        """
        if name not in self:
            raise ValueError(f"{self.source} does not adapt module {name!r}; it adapts {some(list(self.modules), 3)}")
        factors = _load(self.factors[name])
        return factors.scaling * expand_row_blocks(factors.A, factors.B.shape[0]) * factors.B

    def __str__(self) -> str:
        quantized = f", quantized with {self.quantization}" if self.quantization else ""
        lines = [f"SPP adapter {self.source}", f"of {self.base_model or 'an unnamed base model'}{quantized}"]
        if self.modules:
            columns: tuple[str, ...] = (
                "module",
                "shape",
                "trained on",
                "r",
                "s",
                "change (rms)",
                "largest",
                "|A|",
                "|B|",
            )
            if any(module.zeros is not None for module in self):
                columns += ("merged zeros",)
            lines += ["", self.module_table(columns, _cells, right=columns[3:]), ""]
        untouched = sum(1 for module in self if module.norm_B == 0)
        lines.append(f"{len(self)} modules adapted; their weights change by {_share(self.change)} (root mean square)")
        if untouched:
            lines.append(f"{untouched} of them are unchanged: their B is zero")
        if self.trained:
            lines.append(f"{len(self.trained)} other trained tensors: {some(self.trained, 3)}")
        if self.modules and all(module.mask is None for module in self):
            lines.append("no record of the masks of the base model")
        return "\n".join(lines)


def inspect_adapter(
    source: str | PathLike[str],
    *,
    base: str | PathLike[str] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> AdapterInspection:
    """Look into a saved SPP adapter.

    The adapter of a stack of experts (`target_parameters`) is shown expert by expert. The base model's `config.json`
    tells which parameters its factors belong to; nothing else is read of a base model that is not given.

    Args:
        source (`str` or `PathLike`): Its folder.
        base (`str` or `PathLike`, *optional*):
            The base model, as a local folder or the id of a repository on the Hub, to count the zeros of the merged
            weights. By default none are counted, and the base model is the one that the adapter names.
        progress (`Callable[[int, int], object]`, *optional*):
            Called with the number of bytes done and of all bytes of the base model, again and again.

    Returns:
        `AdapterInspection`: The data, with a table as `str()`.

    Raises:
        FileNotFoundError: If it is not an adapter, or the base model is needed and not there.
        ValueError: If it is one of another method, is damaged or not finite, or does not fit the base model.
    """
    folder = Path(source)
    adapter = load_adapter(folder)
    parameters: Mapping[str, AdaptedParameter] = {}
    zeros: Mapping[str, PairCounts] = {}
    if base is not None:
        checkpoint = read_checkpoint(local_folder(base, ignore=OTHER_WEIGHTS))
        plan = plan_merge(checkpoint, adapter)
        parameters, zeros = plan.parameters, count_zeros(checkpoint, plan, progress)
    elif adapter.config.target_parameters:
        parameters = read_parameters(named_base(folder, adapter.config, allow=[CONFIG]), adapter)
    record = adapter.base or BaseRecord()
    factors, masks = {}, {}
    for saved, module in adapter.modules.items():
        parameter = parameters.get(saved)
        for one in parameter.experts if parameter is not None else [module]:
            factors[one.name] = one
            masks[one.name] = record.masks.get(parameter.name if parameter is not None else one.name)
    return AdapterInspection(
        source=str(folder),
        base_model=adapter.config.base_model_name_or_path,
        quantization=record.quantization,
        modules={name: _inspect(one, masks[name], zeros.get(name)) for name, one in factors.items()},
        trained=tuple(adapter.trained),
        factors=factors,
    )


def _load(module: AdaptedModule) -> Factors:
    return module.load(torch.float32)


def _inspect(module: AdaptedModule, mask: MaskRecord | None, zeros: PairCounts | None) -> AdaptedModuleInspection:
    A, B, _ = _load(module)
    scaling = module.scaling
    outputs, inputs = B.shape[0], A.shape[1]
    # Row i of D is s · B_i times row k of A, with k the row's block, so D itself need not be computed.
    blocks = row_block_index(outputs, module.r)
    squares = B.double().square().squeeze(1) * A.double().square().sum(dim=1)[blocks]
    largest = B.abs().squeeze(1) * A.abs().amax(dim=1)[blocks]
    return AdaptedModuleInspection(
        name=module.name,
        shape=(outputs, inputs),
        r=module.r,
        scaling=scaling,
        change=abs(scaling) * math.sqrt(float(squares.sum()) / (outputs * inputs)),
        largest=abs(scaling) * float(largest.max()),
        norm_A=float(A.norm()),
        norm_B=float(B.norm()),
        mask=mask,
        zeros=zeros.zeros_after if zeros is not None else None,
    )


def _cells(group: list[AdaptedModuleInspection]) -> list[str]:
    masks = dict.fromkeys(
        "" if module.mask is None else f"{module.mask.pattern}, {percent(module.mask.sparsity)}" for module in group
    )
    counted = [module for module in group if module.zeros is not None]
    numel = sum(math.prod(module.shape) for module in counted)
    merged = [percent(share(sum(module.zeros or 0 for module in counted), numel))] if counted else []
    return [
        shapes(group),
        next(iter(masks)) if len(masks) == 1 else f"{len(masks)} masks",
        distinct(module.r for module in group),
        distinct(f"{module.scaling:g}" for module in group),
        span((module.change for module in group), _share),
        _share(max(module.largest for module in group)),
        span((module.norm_A for module in group), "{:.3g}".format),
        span((module.norm_B for module in group), "{:.3g}".format),
        *merged,
    ]


def _share(value: float) -> str:
    return f"{100 * value:.3g} %"
