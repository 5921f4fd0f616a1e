# SPDX-License-Identifier: Apache-2.0
"""Letting a module compute with another tensor than its parameter, for the time of a forward pass."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


_TRACED = "_spp_replacements"
_USERS = "_spp_users"
_lock = threading.Lock()


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


class _OfThread(threading.local):
    """What is replaced in the forward passes that a thread is in, the innermost last."""

    def __init__(self) -> None:
        self.replacements: list[tuple[nn.Module, str, _Replacement]] = []


_of_thread = _OfThread()


@contextmanager
def replaced_parameter(module: nn.Module, name: str, compute: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """
    While the context is open, `module.<name>` is `compute(parameter)` in this thread; it is computed once, when it is
    first used. Other threads that use the module meanwhile see the parameter, or what they replace it by.

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
    if torch.compiler.is_compiling():
        with _traced(module, name, compute):
            yield
        return
    _use(module, name, 1)
    _of_thread.replacements.append((module, name, _Replacement(compute)))
    try:
        yield
    finally:
        _of_thread.replacements.pop()
        _use(module, name, -1)


def _use(module: nn.Module, name: str, change: int) -> None:
    """Count the forward passes that replace a parameter: while there are any, the module's class asks each thread."""
    with _lock:
        users: dict[str, int] = dict(module.__dict__.get(_USERS, {}))
        users[name] = users.get(name, 0) + change
        users = {name: count for name, count in users.items() if count}
        cls = _original(type(module))
        module.__class__ = _with_replaced(cls, frozenset(users)) if users else cls  # type: ignore[arg-type]
        if users:
            module.__dict__[_USERS] = users
        else:
            del module.__dict__[_USERS]


@contextmanager
def _traced(module: nn.Module, name: str, compute: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The same in what the compiler can follow; nothing of it is left in the compiled code."""
    cls = module.__class__
    before: dict[str, _Replacement] = module.__dict__.get(_TRACED, {})
    module.__dict__[_TRACED] = {**before, name: _Replacement(compute)}
    module.__class__ = _with_replaced(_original(cls), frozenset(module.__dict__[_TRACED]))  # type: ignore[arg-type]
    try:
        yield
    finally:
        module.__class__ = cls
        if before:
            module.__dict__[_TRACED] = before
        else:
            del module.__dict__[_TRACED]


def _find(module: nn.Module, name: str) -> _Replacement | None:
    if not (torch.compiler.is_compiling() and name in module.__dict__.get(_TRACED, {})):
        found = _find_in_thread(module, name)
        if found is not None:
            return found
    traced: _Replacement | None = module.__dict__.get(_TRACED, {}).get(name)
    return traced


@torch.compiler.disable
def _find_in_thread(module: nn.Module, name: str) -> _Replacement | None:
    for owner, replaced, replacement in reversed(_of_thread.replacements):
        if owner is module and replaced == name:
            return replacement
    return None


def _original(cls: type[nn.Module]) -> type[nn.Module]:
    original: type[nn.Module] = getattr(cls, "_spp_original", cls)
    return original


@cache
def _with_replaced(cls: type[nn.Module], names: frozenset[str]) -> type[nn.Module]:
    """The class of a module of which some parameters are looked up: with properties, which come before attributes."""

    def looked_up(name: str) -> property:
        def read(self: Any) -> Tensor:
            # in replicas, and where FSDP1 flattens parameters, they are plain attributes
            if name in self.__dict__:
                stored: Tensor = self.__dict__[name]
                return stored
            inherited: Tensor = getattr(super(replaced, self), name)
            return inherited

        def get(self: Any) -> Tensor:
            parameter = self._parameters.get(name)
            replacement = _find(self, name)
            if replacement is None:
                return read(self) if parameter is None else parameter
            try:
                return replacement.of(parameter, lambda: read(self))
            except AttributeError as error:
                # nn.Module would take it for a missing attribute, and give the parameter as it is
                raise RuntimeError(f"The adapted parameter {name!r} of {cls.__name__} cannot be computed.") from error

        def put(self: Any, value: Any) -> None:
            self.__dict__[name] = value

        def delete(self: Any) -> None:
            del self.__dict__[name]

        return property(get, put, delete)

    namespace = {
        **{name: looked_up(name) for name in names},
        "_spp_original": cls,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
    }
    replaced = type(cls.__name__, (cls,), namespace)
    return replaced
