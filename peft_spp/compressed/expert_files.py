# SPDX-License-Identifier: Apache-2.0
"""
Stacks of experts in files: a compressed checkpoint has the tensors of the dense one, each without its zeros.

Where that is a tensor for each expert, Transformers makes the stack of them when it loads the model, and takes it
apart when it saves it. Both need dense tensors. If it only puts rows below rows, the same is done here with the values
and the bitmasks. Otherwise a stack is made dense in between, by itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightTransform

from ..checkpoints.compressed_files import bitmask_of, join
from ..checkpoints.conversion import put_together
from ..checkpoints.expert_rows import puts_below
from ..functional.bitmask import Compressed, check_compressed
from ..functional.compressed import compress, decompress
from .expert_converters import BitmaskRenaming, ExpertConverters
from .expert_rows import cut_rows, put_below
from .file_memory import compress_each, page_out
from .operations import Operation, one_of


def read_experts(quantizer: Any, model: PreTrainedModel, transforms: list[WeightTransform]) -> list[WeightTransform]:
    """
    Make the rules by which compressed stacks are loaded.

    Args:
        quantizer (`BitmaskHfQuantizer`): What reads them.
        model (`PreTrainedModel`): The model, without data.
        transforms (`list[WeightTransform]`): The rules for dense ones.

    Returns:
        `list[WeightTransform]`: The rules.
    """
    converters = ExpertConverters(model, transforms)
    shapes = {name: model.get_parameter(name).shape for name in quantizer.stacks}
    names = [name for name, shape in shapes.items() if converters.can_compress(name, shape)]
    apart = [converters.find(name) for name in names]
    renamings = {
        tuple(rule.source_patterns): rule
        for name in names
        for part in converters.parts(name, torch.empty(shapes[name], device="meta"))
        for rule in converters.for_bitmask(part)
    }
    rules = [
        _by(_ReadApart(quantizer, one, converters), map(bitmask_of, one._original_source_patterns))
        if isinstance(one, WeightConverter) and one in apart
        else one
        for one in transforms
    ]
    ends = sorted({".".join(name.split(".")[-2:]) for name in names})
    return [*rules, *renamings.values(), *(_whole(end, quantizer) for end in ends)]


def compress_experts(
    quantizer: Any, model: PreTrainedModel, transforms: list[WeightTransform]
) -> list[WeightTransform]:
    """
    Make the rules by which stacks are compressed while they are loaded, if they are dense and made of other tensors.

    Args:
        quantizer (`BitmaskHfQuantizer`): What compresses them.
        model (`PreTrainedModel`): The model, without data.
        transforms (`list[WeightTransform]`): The rules for dense ones.

    Returns:
        `list[WeightTransform]`: The rules.
    """
    converters = ExpertConverters(model, transforms)
    made = [converters.find(name) for name in quantizer.stacks]
    return [
        _by(_CompressApart(quantizer, one, converters))
        if isinstance(one, WeightConverter) and one in made and puts_below(one)
        else one
        for one in transforms
    ]


def save_as_dense(transforms: list[WeightTransform]) -> None:
    """Put the rules for dense stacks back, by which a model is saved."""
    transforms[:] = [
        operation.original if isinstance(operation, _Apart) else one
        for one in transforms
        for operation in [one.operations[0] if isinstance(one, WeightConverter) else None]
        if not isinstance(operation, _ReadWhole) and not isinstance(one, BitmaskRenaming)
    ]


def stored_experts(
    model: PreTrainedModel, stacks: Mapping[str, Any], transforms: Sequence[WeightTransform]
) -> dict[str, tuple[dict[str, Tensor], int]]:
    """
    Take compressed stacks apart as a checkpoint has them.

    Args:
        model (`PreTrainedModel`): The model.
        stacks (`Mapping[str, Compressed]`): The stacks by name.
        transforms (`Sequence[WeightTransform]`): The rules by which the model is saved.

    Returns:
        `dict[str, tuple[dict[str, torch.Tensor], int]]`: For each name of a weight in files, before the renamings are
        reverted, its values and its bitmask by name, and its number of columns.

    Raises:
        ValueError: If a stack has no data.
    """
    converters = ExpertConverters(model, transforms)
    stored: dict[str, Any] = {}
    for name, stack in stacks.items():
        converter = converters.find(name)
        if converter is None:
            stored[name] = ({name: stack.values, converters.bitmask_of(name): stack.bitmask}, stack.columns)
            continue
        if stack.values.is_meta:
            raise ValueError(
                f"{name} has no data in memory (it is offloaded), and is stored as other tensors: load the model "
                "without offloading to save it"
            )
        if puts_below(converter):
            kinds = list(converters.by_pattern(name, converter, stack.shape).values())
            rows = cut_rows(stack, [next(iter(kind.values()))[0] for kind in kinds])
            own = {
                part: one for kind, cut in zip(kinds, rows, strict=True) for part, one in zip(kind, cut, strict=True)
            }
        else:
            own = {part: compress(dense) for part, dense in converters.parts(name, decompress(stack)).items()}
        for part, one in own.items():
            stored[part] = ({part: one.values, converters.bitmask_of(part): one.bitmask}, one.columns)
    return stored


def _by(operation: _Apart, more_sources: Iterable[str] = ()) -> WeightConverter:
    """The rule that an operation takes the place of, with that operation."""
    sources, targets = operation.original._original_source_patterns, operation.original._original_target_patterns
    return operation.original.copy([*sources, *more_sources], list(targets), operations=[operation])


def _whole(end: str, quantizer: Any) -> WeightConverter:
    return WeightConverter([f"{re.escape(one)}$" for one in (end, bitmask_of(end))], end, [_ReadWhole(quantizer)])


class _ReadWhole(Operation):
    """A stack that is stored as it is."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: Any = (), *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        model, name = kwargs["model"], kwargs["full_layer_name"]
        values, bitmask = (input_dict.get(pattern) for pattern in source_patterns)
        if bitmask is None:
            if values is not None and one_of(values).ndim == 1:
                self.hf_quantizer.problems.append(f"{name}: the checkpoint has its values and no bitmask")
                return {}
            return {name: values}
        if values is None:
            self.hf_quantizer.problems.append(f"{name}: the checkpoint has its bitmask and no values")
            return {}
        read, bits = one_of(values), one_of(bitmask)
        try:
            row_offsets = check_compressed(read, bits, model.get_parameter(name).shape, name)
        except ValueError as error:
            self.hf_quantizer.problems.append(str(error))
            return {}
        return self.hf_quantizer.put_stack(model, name, read, bits, row_offsets)  # type: ignore[no-any-return]


class _Apart(Operation):
    """A stack that is made of other tensors."""

    supports_many_to_many = True

    def __init__(self, quantizer: Any, original: WeightConverter, converters: ExpertConverters) -> None:
        super().__init__(quantizer)
        self.original = original
        self._converters = converters

    def _expected(self, model: PreTrainedModel, name: str) -> dict[str, dict[str, Any]]:
        return self._converters.by_pattern(name, self.original, model.get_parameter(name).shape)

    def _dense(self, model: PreTrainedModel, name: str, parts: Sequence[list[Tensor]]) -> dict[str, Tensor]:
        return put_together(model, self.original, name, dict(zip(self.original.source_patterns, parts, strict=True)))

    def _put(self, model: PreTrainedModel, name: str, stack: Compressed) -> dict[str, Any]:
        return self.hf_quantizer.put_stack(model, name, stack.values, stack.bitmask, stack.row_offsets)  # type: ignore[no-any-return]


class _CompressApart(_Apart):
    """A stack that is compressed tensor by tensor while it is put together."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: Any = (), *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        model, name = kwargs["model"], kwargs["full_layer_name"]
        parts = [list(input_dict.pop(pattern, ())) for pattern in source_patterns]
        expected = [list(kind.values()) for kind in self._expected(model, name).values()]
        # what does not fit is put together and reported as for any model
        fits = [[tuple(one.shape) for one in own] for own in parts] == expected
        if not fits or not self.hf_quantizer.is_to_compress(model, name, [one for own in parts for one in own]):
            return dict(self._dense(model, name, parts))
        return self._put(model, name, put_below([compress_each(own, self.hf_quantizer.files) for own in parts]))


class _ReadApart(_Apart):
    """A stack that is made of compressed tensors."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: Any = (), *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        model, name = kwargs["model"], kwargs["full_layer_name"]
        read = {pattern: list(input_dict.pop(pattern, ())) for pattern in source_patterns}
        count = len(self.original.source_patterns)
        of_pattern = dict(zip(source_patterns[:count], source_patterns[count:], strict=True))
        parts = [read[values] for values in of_pattern]
        try:
            if not any(read[bitmask] for bitmask in of_pattern.values()):
                if any(one.ndim == 1 for own in parts for one in own):
                    raise ValueError(f"{name}: the checkpoint has the values of its experts and no bitmasks")
                return dict(self._dense(model, name, parts))
            joined = self._joined(model, name, [(read[values], read[bits]) for values, bits in of_pattern.items()])
        except ValueError as error:
            self.hf_quantizer.problems.append(str(error))
            return {}
        if puts_below(self.original):
            stack = put_below(joined)
        else:
            del read
            stack = compress(self._dense(model, name, [[decompress(one) for one in own] for own in joined])[name])
        page_out(self.hf_quantizer.files)
        return self._put(model, name, stack)

    def _joined(
        self, model: PreTrainedModel, name: str, read: Sequence[tuple[list[Tensor], list[Tensor]]]
    ) -> list[list[Compressed]]:
        joined = []
        for (pattern, wanted), (values, bitmasks) in zip(self._expected(model, name).items(), read, strict=True):
            if not len(values) == len(bitmasks) == len(wanted):
                raise ValueError(
                    f"{name}: of its {len(wanted)} experts the checkpoint has {len(values)} weights and "
                    f"{len(bitmasks)} bitmasks of the name {self._converters.stored_name(pattern)}"
                )
            named = [(self._converters.stored_name(part), shape) for part, shape in wanted.items()]
            triples = zip(named, values, bitmasks, strict=True)
            joined.append([join(part, one, bitmask, shape) for (part, shape), one, bitmask in triples])
        return joined
