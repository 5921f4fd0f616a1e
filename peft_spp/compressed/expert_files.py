# SPDX-License-Identifier: Apache-2.0
"""
Stacks of experts in files: a compressed checkpoint has the tensors of the dense one, each without its zeros.

Where that is a tensor for each expert, Transformers makes the stack of them when it loads the model, and takes it
apart when it saves it. Both need dense tensors. So a stack is made dense in between, by itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    apply_renamings,
    dot_natural_key,
)

from ..checkpoints.compressed_files import bitmask_of, join
from ..checkpoints.conversion import put_together, take_apart
from ..functional.bitmask import check_compressed
from ..functional.compressed import compress, decompress
from .operations import Operation, one_of


class ExpertConverters:
    """
    Which stacks of a model are stored in another form, by the rules by which it was or will be loaded.

    Args:
        model (`PreTrainedModel`): The model, which may be on the meta device.
        transforms (`Sequence[WeightTransform]`): The rules.
    """

    def __init__(self, model: PreTrainedModel, transforms: Sequence[WeightTransform]) -> None:
        self._model = model
        # the last rule is reverted first
        converters = [one for one in reversed(transforms) if isinstance(one, WeightConverter)]
        self._reverted = [(one, one.reverse_transform()) for one in converters]
        renamings = [one.reverse_transform() for one in reversed(transforms) if isinstance(one, WeightRenaming)]
        self._renamings = cast(list[WeightRenaming], renamings)

    def find(self, name: str) -> WeightConverter | None:
        """What makes a stack, if it is not stored as it is."""
        return next((one for one, back in self._reverted if back.rename_source_key(name)[1] is not None), None)

    def parts(self, name: str, stack: Tensor) -> dict[str, Tensor]:
        """The stored tensors of a stack, by the names before the renamings are reverted; see [`take_apart`]."""
        converter = self.find(name)
        return {name: stack} if converter is None else take_apart(self._model, converter, {name: stack})

    def can_compress(self, name: str, shape: Sequence[int]) -> bool:
        """Whether a stack is stored as weights of two dimensions or more that nothing else is made of."""
        try:
            parts = self.parts(name, torch.empty(tuple(shape), device="meta"))
        except Exception:  # whatever an operation without a way back raises
            return False
        places = sum(part.numel() for part in parts.values())
        return places == torch.Size(shape).numel() and all(part.ndim > 1 for part in parts.values())

    def stored_name(self, name: str) -> str:
        """The name in files of a part of a stack."""
        return apply_renamings(name, self._renamings)


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
    names = quantizer.stacks
    apart = [converters.find(name) for name in names if converters.can_compress(name, model.get_parameter(name).shape)]
    rules = [
        _apart(one, quantizer, converters) if isinstance(one, WeightConverter) and one in apart else one
        for one in transforms
    ]
    ends = sorted({".".join(name.split(".")[-2:]) for name in names})
    return [*rules, *(_whole(end, quantizer) for end in ends)]


def save_as_dense(transforms: list[WeightTransform]) -> None:
    """Put the rules for dense stacks back, by which a model is saved."""
    transforms[:] = [
        operation.original if isinstance(operation, _ReadApart) else one
        for one in transforms
        for operation in [one.operations[0] if isinstance(one, WeightConverter) else None]
        if not isinstance(operation, _ReadWhole)
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
        if converters.find(name) is None:
            stored[name] = ({name: stack.values, bitmask_of(name): stack.bitmask}, stack.columns)
            continue
        if stack.values.is_meta:
            raise ValueError(
                f"{name} has no data in memory (it is offloaded), and is stored as other tensors: load the model "
                "without offloading to save it"
            )
        for part, dense in converters.parts(name, decompress(stack)).items():
            own = compress(dense)
            stored[part] = ({part: own.values, bitmask_of(part): own.bitmask}, own.columns)
    return stored


def _apart(original: WeightConverter, quantizer: Any, converters: ExpertConverters) -> WeightConverter:
    sources = original._original_source_patterns
    operation = _ReadApart(quantizer, original, converters)
    return original.copy(
        [*sources, *map(bitmask_of, sources)], list(original._original_target_patterns), operations=[operation]
    )


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


class _ReadApart(Operation):
    """A stack that is made of other tensors."""

    supports_many_to_many = True

    def __init__(self, quantizer: Any, original: WeightConverter, converters: ExpertConverters) -> None:
        super().__init__(quantizer)
        self.original = original
        self._converters = converters

    def convert(
        self, input_dict: dict[str, Any], source_patterns: Any = (), *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        model, name = kwargs["model"], kwargs["full_layer_name"]
        read = {pattern: list(input_dict.pop(pattern, ())) for pattern in source_patterns}
        count = len(self.original.source_patterns)
        of_pattern = dict(zip(source_patterns[:count], source_patterns[count:], strict=True))
        is_compressed = any(read[bitmask] for bitmask in of_pattern.values())
        try:
            parts = [read[values] for values in of_pattern]
            if is_compressed:
                pairs = [(read[values], read[bitmasks]) for values, bitmasks in of_pattern.items()]
                parts = self._dense(model, name, pairs)
            elif any(one.ndim == 1 for own in parts for one in own):
                raise ValueError(f"{name}: the checkpoint has the values of its experts and no bitmasks")
        except ValueError as error:
            self.hf_quantizer.problems.append(str(error))
            return {}
        del read
        stacks = put_together(model, self.original, name, dict(zip(self.original.source_patterns, parts, strict=True)))
        del parts
        if not is_compressed:
            return dict(stacks)
        stack = compress(stacks.pop(name))
        return self.hf_quantizer.put_stack(model, name, stack.values, stack.bitmask, stack.row_offsets)  # type: ignore[no-any-return]

    def _dense(
        self, model: PreTrainedModel, name: str, read: Sequence[tuple[list[Tensor], list[Tensor]]]
    ) -> list[list[Tensor]]:
        expected = self._converters.parts(name, torch.empty(model.get_parameter(name).shape, device="meta"))
        names: dict[str, list[str]] = {}
        for part in sorted(expected, key=dot_natural_key):
            pattern = self.original.rename_source_key(part)[1]
            names.setdefault(str(pattern), []).append(part)
        dense = []
        for pattern, (values, bitmasks) in zip(self.original.source_patterns, read, strict=True):
            wanted = names.get(pattern, [])
            if not len(values) == len(bitmasks) == len(wanted):
                raise ValueError(
                    f"{name}: of its {len(wanted)} experts the checkpoint has {len(values)} weights and "
                    f"{len(bitmasks)} bitmasks of the name {self._converters.stored_name(pattern)}"
                )
            named = [(self._converters.stored_name(part), tuple(expected[part].shape)) for part in wanted]
            triples = zip(named, values, bitmasks, strict=True)
            dense.append([decompress(join(part, one, bitmask, shape)) for (part, shape), one, bitmask in triples])
        return dense
