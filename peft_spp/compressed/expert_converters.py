# SPDX-License-Identifier: Apache-2.0
"""In which form Transformers stores the stacks of experts of a model, and under which names."""

from __future__ import annotations

from collections.abc import Sequence
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

from ..checkpoints.compressed_files import bitmask_of
from ..checkpoints.conversion import take_apart
from .experts import find_compressed_stacks


class BitmaskRenaming(WeightRenaming):  # type: ignore[misc]
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

    def by_pattern(self, name: str, converter: WeightConverter, shape: Sequence[int]) -> dict[str, dict[str, Any]]:
        """The stored tensors of a stack and their shapes, in the order of the experts, by the converter's patterns."""
        parts = self.parts(name, torch.empty(tuple(shape), device="meta"))
        found: dict[str, dict[str, Any]] = {pattern: {} for pattern in converter.source_patterns}
        for part in sorted(parts, key=dot_natural_key):
            found[cast(str, converter.rename_source_key(part)[1])][part] = tuple(parts[part].shape)
        return found

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
        return all(renamed(self.bitmask_of(part), back) == bitmask_of(renamed(part, back)) for part in parts)

    def bitmask_of(self, part: str) -> str:
        """The name of the bitmask of a part, before the renamings are reverted."""
        return renamed(bitmask_of(part), [one.reverse_transform() for one in self.for_bitmask(part)])

    def for_bitmask(self, part: str) -> list[WeightRenaming]:
        """Rules for the bitmask of a part, where the model has another name for the weight than the files."""
        rules: list[WeightRenaming] = []
        for one in self._renamings:
            back = one.reverse_transform()
            stored, pattern = back.rename_source_key(part)
            if pattern is None or back.rename_source_key(bitmask_of(part))[0] == bitmask_of(stored):
                continue
            sources, targets = one._original_source_patterns, one._original_target_patterns
            rule = BitmaskRenaming([*map(bitmask_of, sources)], [*map(bitmask_of, targets)])
            rule.scope_prefix, rule.base_model_prefix = one.scope_prefix, one.base_model_prefix
            rules.append(rule)
        return rules

    def stored_name(self, name: str) -> str:
        """The name of a part of a stack in the files that have been read."""
        return renamed(name, [one.reverse_transform() for one in self._renamings if one.was_used()])


def renamed(name: str, renamings: Sequence[WeightTransform]) -> str:
    return apply_renamings(name, cast(list[WeightRenaming], renamings))
