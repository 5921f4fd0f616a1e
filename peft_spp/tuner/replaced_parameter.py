# SPDX-License-Identifier: Apache-2.0
"""Letting a module compute with another tensor than its parameter, for the time of a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import Tensor, nn


_ATTRIBUTE = "_spp_replacements"


class _Replacement:
    """
    Computes the tensor that stands for a parameter when it is first asked for, and keeps it.

    Args:
        compute (`Callable[[torch.Tensor], torch.Tensor]`): Makes it of the parameter.
    """

    def __init__(self, compute: Callable[[Tensor], Tensor]) -> None:
        self.compute = compute
        self.parameter: Tensor | None = None
        self.result: Tensor | None = None

    def of(self, parameter: Tensor | None, read: Callable[[], Tensor]) -> Tensor:
        # An offloading hook puts another parameter in place when the module's own forward begins: what was computed
        # of the one before is of no use then.
        if self.result is None or parameter is not self.parameter:
            self.parameter = parameter
            self.result = self.compute(read() if parameter is None else parameter)
        return self.result


@contextmanager
def replaced_parameter(module: nn.Module, name: str, compute: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """
    While the context is open, `module.<name>` is `compute(parameter)`; it is computed once, when it is first used.

    `torch.nn.utils.parametrize` does the like, but moves the parameter into a module of its own and back at every
    forward pass: the order of the parameters changes, by which PEFT nests wrappers and names what it saves; hooks that
    gather or load the parameters of the module no longer find it; and each time there is a new class, for which
    `torch.compile` compiles again. Here the parameter stays where it is. If `torch.nn.utils.parametrize` computes it,
    that comes first.

    Args:
        module (`nn.Module`): The module that holds the parameter.
        name (`str`): The name of the parameter in it.
        compute (`Callable[[torch.Tensor], torch.Tensor]`): Makes the tensor to use of the parameter.
    """
    cls = module.__class__
    before: dict[str, _Replacement] = module.__dict__.get(_ATTRIBUTE, {})
    module.__dict__[_ATTRIBUTE] = {**before, name: _Replacement(compute)}
    module.__class__ = _with_replaced(cls, name)  # type: ignore[arg-type]  # mypy takes Module.__hash__ for cls'
    try:
        yield
    finally:
        module.__class__ = cls
        if before:
            module.__dict__[_ATTRIBUTE] = before
        else:
            del module.__dict__[_ATTRIBUTE]


@cache
def _with_replaced(cls: type[nn.Module], name: str) -> type[nn.Module]:
    def get(self: Any) -> Tensor:
        try:
            replacement: _Replacement = self.__dict__[_ATTRIBUTE][name]
            return replacement.of(self._parameters.get(name), lambda: getattr(super(replaced, self), name))
        except AttributeError as error:
            # nn.Module would take it for a missing attribute, and give the parameter as it is
            raise RuntimeError(f"The adapted parameter {name!r} of {cls.__name__} cannot be computed.") from error

    namespace = {name: property(get), "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    replaced = type(cls.__name__, (cls,), namespace)
    return replaced
