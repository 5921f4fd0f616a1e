# SPDX-License-Identifier: Apache-2.0
"""Which tensors of a checkpoint a parameter of a model is made of when Transformers loads it, and the way back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
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
from ..reports import some
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


class Origins(dict[str, Origin]):
    """Where a checkpoint has the parameters of a model, by name; those that cannot be made of it are left out.

    Args:
        model (`PreTrainedModel`): The model, which may be on the meta device.
        tensors (`Iterable[StoredTensor]`): What the checkpoint holds.
    """

    def __init__(self, model: PreTrainedModel, tensors: Iterable[StoredTensor]) -> None:
        super().__init__()
        self._rules = _Rules(model)
        self._parts: dict[str, list[Part]] = {}
        by_name = {one.name: one for one in tensors}
        for name, parameter, pattern in self._rules.taken_up(by_name):
            renamed = apply_renamings(name, self._rules.renamings) if pattern else name
            self._parts.setdefault(parameter, []).append(Part(by_name[name], renamed, pattern))
        for first, parts in self._parts.items():
            origin = Origin(model, first, tuple(parts), self._rules.converter(parts))
            try:
                names: Sequence[str] = list(origin.shapes)
            except Exception:  # whatever an operation raises that does not fit what is stored
                continue
            self.update({name: origin for name in names if name in self._rules.state})

    def whole(self, name: str, folder: Path, instead: str) -> Origin:
        """
        Where a parameter is.

        Args:
            name (`str`): The name of the parameter.
            folder (`Path`): What to call the checkpoint in a message.
            instead (`str`): What to do if Transformers may have other tensors to make it of.

        Raises:
            ValueError: If it is not there, or not all of it; the message names what is missing.
        """
        origin, expected = self.get(name), tuple(self._rules.state[name].shape)
        if origin is not None and origin.shapes[name] == expected:
            return origin
        missing = self._missing_experts(name)
        if missing:
            raise ValueError(
                f"{folder} has no tensor {some(list(map(repr, missing)), 3)}, which Transformers puts into {name!r} "
                "when it loads the model: the checkpoint is not whole. Copy or download it again, with all its files."
            )
        if origin is None:
            raise ValueError(
                f"{folder} has no tensor {name!r}, nor the tensors that Transformers builds it from when it loads the "
                f"model. {instead}"
            )
        one = origin.tensors[0]
        what = f"has shape {one.shape}"
        if origin.converter is not None:
            what = f"and {len(origin.tensors) - 1} others make {name} of shape {origin.shapes[name]}"
        raise ValueError(f"tensor {one.name!r} of {one.file} {what}, but config.json implies {expected}")

    def _missing_experts(self, stack: str) -> list[str]:
        """
        The tensors of experts that are missing of a stack, as the checkpoint would call them; of a kind that is
        missing altogether, the pattern of their names.
        """
        parts = self._parts.get(stack, [])
        converter = self._rules.converter(parts)
        if converter is None:
            return []
        names = {part.tensor.name: part.tensor.name.split(".") for part in parts}
        # the names differ in one number, that of the expert
        columns = enumerate(zip(*names.values(), strict=False))
        numbers = [at for at, column in columns if len(set(column)) > 1 and all(map(str.isdecimal, column))]
        expected = []
        for pattern in converter.source_patterns:
            of_kind = next((names[part.tensor.name] for part in parts if part.pattern == pattern), None)
            if of_kind is None:
                expected.append(pattern)
            elif len(numbers) == 1:
                before, after = of_kind[: numbers[0]], of_kind[numbers[0] + 1 :]
                count = len(self._rules.state[stack])
                expected += [".".join([*before, str(index), *after]) for index in range(count)]
        return [name for name in expected if name not in names]


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

    def converter(self, parts: Sequence[Part]) -> WeightConverter | None:
        return next((self.of_pattern[part.pattern] for part in parts if part.pattern), None)

    def taken_up(self, names: Iterable[str]) -> Iterator[tuple[str, str, str]]:
        """The stored tensors that are loaded, each with the (first) parameter it makes and its part in a converter."""
        # in the order of Transformers, which is that of the experts in a stack
        for name in sorted(names, key=dot_natural_key):
            renamed, pattern = rename_source_key(name, self.renamings, self.converters, self._prefix, self.state)
            if renamed not in self.state and name in self.state:
                renamed, pattern = rename_source_key(name, [], [], self._prefix, self.state)
            if renamed in self.state:
                yield name, renamed, pattern or ""


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
