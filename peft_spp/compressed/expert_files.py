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
from .experts import find_compressed_stacks
from .operations import Operation, one_of


class _BitmaskRenaming(WeightRenaming):  # type: ignore[misc]
    """A renaming of a weight, for its bitmask."""

    __slots__ = ()


class _WithDenseShapes:
    """A model for operations that look at the shapes of its parameters: those of compressed stacks have all zeros."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._stacks = find_compressed_stacks(model)

    def get_parameter(self, name: str) -> Tensor:
        if name not in self._stacks:
            return self._model.get_parameter(name)
        module, stack = self._stacks[name]
        return torch.empty(module.compressed(stack).shape, device="meta")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class ExpertConverters:
    """
    Which stacks of a model are stored in another form, by the rules by which it was or will be loaded.

    Args:
        model (`PreTrainedModel`): The model, which may be on the meta device.
        transforms (`Sequence[WeightTransform]`): The rules.
    """

    def __init__(self, model: PreTrainedModel, transforms: Sequence[WeightTransform]) -> None:
        self._with_shapes = cast(PreTrainedModel, _WithDenseShapes(model))
        # the last rule is reverted first
        converters = [one for one in reversed(transforms) if isinstance(one, WeightConverter)]
        self._reverted = [(one, one.reverse_transform()) for one in converters]
        self._renamings = [one for one in reversed(transforms) if isinstance(one, WeightRenaming)]

    def find(self, name: str) -> WeightConverter | None:
        """What makes a stack, if it is not stored as it is."""
        return next((one for one, back in self._reverted if back.rename_source_key(name)[1] is not None), None)

    def parts(self, name: str, stack: Tensor) -> dict[str, Tensor]:
        """The stored tensors of a stack, by the names before the renamings are reverted; see [`take_apart`]."""
        converter = self.find(name)
        return {name: stack} if converter is None else take_apart(self._with_shapes, converter, {name: stack})

    def can_compress(self, name: str, shape: Sequence[int]) -> bool:
        """Whether a stack is stored as weights of two dimensions or more that nothing else is made of."""
        try:
            parts = self.parts(name, torch.empty(tuple(shape), device="meta"))
        except Exception:  # whatever an operation without a way back raises
            return False
        places = sum(part.numel() for part in parts.values())
        if places != torch.Size(shape).numel() or not all(part.ndim > 1 for part in parts.values()):
            return False
        # a bitmask has the name that its weight has in the files, and the model has to find it by that
        back = [one.reverse_transform() for one in self._renamings]
        return all(_renamed(self.bitmask_of(part), back) == bitmask_of(_renamed(part, back)) for part in parts)

    def bitmask_of(self, part: str) -> str:
        """The name of the bitmask of a part, before the renamings are reverted."""
        return _renamed(bitmask_of(part), [one.reverse_transform() for one in self.for_bitmask(part)])

    def for_bitmask(self, part: str) -> list[WeightRenaming]:
        """Rules for the bitmask of a part, where the model has another name for the weight than the files."""
        rules: list[WeightRenaming] = []
        for one in self._renamings:
            back = one.reverse_transform()
            renamed, pattern = back.rename_source_key(part)
            if pattern is None or back.rename_source_key(bitmask_of(part))[0] == bitmask_of(renamed):
                continue
            sources, targets = one._original_source_patterns, one._original_target_patterns
            rule = _BitmaskRenaming([*map(bitmask_of, sources)], [*map(bitmask_of, targets)])
            rule.scope_prefix, rule.base_model_prefix = one.scope_prefix, one.base_model_prefix
            rules.append(rule)
        return rules

    def stored_name(self, name: str) -> str:
        """The name of a part of a stack in the files that have been read."""
        return _renamed(name, [one.reverse_transform() for one in self._renamings if one.was_used()])


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
        _apart(one, quantizer, converters) if isinstance(one, WeightConverter) and one in apart else one
        for one in transforms
    ]
    ends = sorted({".".join(name.split(".")[-2:]) for name in names})
    return [*rules, *renamings.values(), *(_whole(end, quantizer) for end in ends)]


def save_as_dense(transforms: list[WeightTransform]) -> None:
    """Put the rules for dense stacks back, by which a model is saved."""
    transforms[:] = [
        operation.original if isinstance(operation, _ReadApart) else one
        for one in transforms
        for operation in [one.operations[0] if isinstance(one, WeightConverter) else None]
        if not isinstance(operation, _ReadWhole) and not isinstance(one, _BitmaskRenaming)
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
            stored[name] = ({name: stack.values, converters.bitmask_of(name): stack.bitmask}, stack.columns)
            continue
        if stack.values.is_meta:
            raise ValueError(
                f"{name} has no data in memory (it is offloaded), and is stored as other tensors: load the model "
                "without offloading to save it"
            )
        for part, dense in converters.parts(name, decompress(stack)).items():
            own = compress(dense)
            stored[part] = ({part: own.values, converters.bitmask_of(part): own.bitmask}, own.columns)
    return stored


def _renamed(name: str, renamings: Sequence[WeightTransform]) -> str:
    return apply_renamings(name, cast(list[WeightRenaming], renamings))


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
