# SPDX-License-Identifier: Apache-2.0
"""Which tensors of a checkpoint a parameter of a model is made of when Transformers loads it, and the way back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from ..error_text import message
from .tensor_file import StoredTensor


@dataclass(frozen=True, eq=False)
class Part:
    """A stored tensor as Transformers takes it up."""

    tensor: StoredTensor
    name: str  # its name once the model's renamings are applied
    pattern: str  # which of the sources of the converter it is; empty if there is none


@dataclass(frozen=True, eq=False)
class Origin:
    """Where a checkpoint has a parameter, or several that are made together."""

    model: PreTrainedModel  # the model, which may be on the meta device
    first: str  # the first of the parameters
    parts: tuple[Part, ...]  # what they are made of, in the order of Transformers
    converter: WeightConverter | None = None  # what makes them, if they are not stored as they are

    @property
    def tensors(self) -> list[StoredTensor]:
        return [part.tensor for part in self.parts]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The parameters and their shapes; what the converter raises if it cannot make them."""
        made = self._convert([torch.empty(one.shape, device="meta") for one in self.tensors])
        return {name: tuple(one.shape) for name, one in made.items()}

    def load(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Make the parameters, in a dtype."""
        return self._convert([one.load().to(dtype) for one in self.tensors])

    def _convert(self, tensors: list[Tensor]) -> dict[str, Tensor]:
        if self.converter is None:
            return {self.first: tensors[0]}
        converter = deepcopy(self.converter)
        for part in self.parts:
            # one by one out of the list, so that the converter can free them
            _add(converter, self.first, part.name, part.pattern, tensors.pop(0))
        return _made(converter, self.first, self.model)

    def stored(self, parameters: Mapping[str, Tensor]) -> list[tuple[StoredTensor, Tensor]]:
        """
        What is stored of the parameters, which may have changed; a `ValueError` if they cannot be taken apart again.
        """
        if self.converter is None:
            return [(self.tensors[0], parameters[self.first])]
        try:
            values = take_apart(self.model, self.converter, {name: parameters[name] for name in self.shapes})
        except Exception as error:  # whatever an operation without a way back raises
            raise ValueError(f"{self.first} cannot be taken apart again: {message(error)}") from error
        prefix = f"{self.model.base_model_prefix}."
        found = []
        for part in self.parts:
            names = (part.name, part.name.removeprefix(prefix), prefix + part.name)
            value = next((values[name] for name in names if name in values), None)
            if value is None or value.shape != part.tensor.shape:
                raise ValueError(f"{self.first} cannot be taken apart again: there is no {part.tensor.name} in it")
            found.append((part.tensor, value))
        return found

    def check_reversible(self, parameters: Mapping[str, Tensor]) -> None:
        """Raise a `ValueError` unless the unchanged parameters give the bits that are stored."""
        if self.converter is None:
            return
        for tensor, value in self.stored(parameters):
            if not same_bits(value, tensor.load()):
                raise ValueError(f"{self.first} cannot be taken apart again: {tensor.name} would change")

    def tensors_of_expert(self, index: int, experts: int) -> list[StoredTensor]:
        """The stored tensors that hold one of the experts in a stack; all of them if they are not one for each."""
        by_pattern: dict[str, list[StoredTensor]] = {}
        for part in self.parts:
            by_pattern.setdefault(part.pattern, []).append(part.tensor)
        groups = by_pattern.values()
        return [one for group in groups for one in (group[index : index + 1] if len(group) == experts else group)]


def find_origins(model: PreTrainedModel, tensors: Iterable[StoredTensor]) -> dict[str, Origin]:
    """
    Where a checkpoint has the parameters of a model, by the rules by which Transformers loads it; those that cannot be
    made of it are left out.
    """
    rules, by_name = _Rules(model), {one.name: one for one in tensors}
    groups: dict[str, list[Part]] = {}
    for name, parameter, pattern in rules.taken_up(by_name):
        renamed = apply_renamings(name, rules.renamings) if pattern else name
        groups.setdefault(parameter, []).append(Part(by_name[name], renamed, pattern))
    found: dict[str, Origin] = {}
    for first, parts in groups.items():
        origin = Origin(model, first, tuple(parts), _converter(parts, rules.of_pattern))
        try:
            names: Sequence[str] = list(origin.shapes)
        except Exception:  # whatever an operation raises that does not fit what is stored
            continue
        found |= {name: origin for name in names if name in rules.state}
    return found


def stored_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """
    The names in a checkpoint of those parameters of a model that it has as they are, by their names in the model.
    """
    found: dict[str, str] = {}
    for name, parameter, pattern in _Rules(model).taken_up(names):
        if not pattern:
            found.setdefault(parameter, name)
    return found


def take_apart(
    model: PreTrainedModel, converter: WeightConverter, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """
    Take parameters apart as Transformers does when it saves them.

    Args:
        model (`PreTrainedModel`): The model, which may be on the meta device.
        converter (`WeightConverter`): What makes these parameters when the model is loaded.
        parameters (`Mapping[str, torch.Tensor]`): All that it makes together, by name.

    Returns:
        `dict[str, torch.Tensor]`: What is stored, by the names before the model's renamings are reverted.

    Raises:
        ValueError: If nothing takes one of them apart. An operation without a way back raises what it likes.
    """
    back = cast(WeightConverter, converter.reverse_transform())
    groups: dict[str, WeightConverter] = {}
    for name, parameter in parameters.items():
        renamed, pattern = back.rename_source_key(name)
        if pattern is None:
            raise ValueError(f"nothing takes {name} apart")
        _add(groups.setdefault(renamed, deepcopy(back)), renamed, name, pattern, parameter)
    made = [_made(one, name, model) for name, one in groups.items()]
    return {name: value for one in made for name, value in one.items()}


def put_together(
    model: PreTrainedModel, converter: WeightConverter, name: str, parts: Mapping[str, list[Tensor]]
) -> dict[str, Tensor]:
    """
    Make parameters of what is stored, as Transformers does when it loads them.

    Args:
        model (`PreTrainedModel`): The model, which may be on the meta device.
        converter (`WeightConverter`): What makes the parameters.
        name (`str`): The name of the first of them.
        parts (`Mapping[str, list[torch.Tensor]]`): The stored tensors by the converter's patterns, in order. The
            lists are emptied, so that the converter can free the tensors.

    Returns:
        `dict[str, torch.Tensor]`: The parameters, by name.
    """
    converter = deepcopy(converter)
    for pattern, tensors in parts.items():
        while tensors:
            _add(converter, name, name, pattern, tensors.pop(0))
    return _made(converter, name, model)


class _Rules:
    """The rules by which Transformers loads a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        transforms = get_model_conversion_mapping(model)
        self.renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        self.converters = [one for one in transforms if isinstance(one, WeightConverter)]
        self.of_pattern = {pattern: one for one in self.converters for pattern in one.source_patterns}
        self.state = model.state_dict()
        self._prefix = model.base_model_prefix

    def taken_up(self, names: Iterable[str]) -> Iterator[tuple[str, str, str]]:
        """The stored tensors that are loaded, each with the (first) parameter it makes and its part in a converter."""
        # in the order of Transformers, which is that of the experts in a stack
        for name in sorted(names, key=dot_natural_key):
            renamed, pattern = rename_source_key(name, self.renamings, self.converters, self._prefix, self.state)
            if renamed not in self.state and name in self.state:
                renamed, pattern = rename_source_key(name, [], [], self._prefix, self.state)
            if renamed in self.state:
                yield name, renamed, pattern or ""


def _converter(parts: Sequence[Part], of_pattern: Mapping[str, WeightConverter]) -> WeightConverter | None:
    return next((of_pattern[part.pattern] for part in parts if part.pattern), None)


def _add(converter: WeightConverter, target: str, source: str, pattern: str, tensor: Tensor) -> None:
    # as Transformers' own saving does, where it has the tensor already
    converter.add_tensor(target, source, pattern, cast(Any, tensor))


def _made(converter: WeightConverter, name: str, model: PreTrainedModel) -> dict[str, Tensor]:
    made = converter.convert(name, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
