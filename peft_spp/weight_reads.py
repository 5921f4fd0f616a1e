# SPDX-License-Identifier: Apache-2.0
"""What a module reads of the weight of one of its layers: the numbers, or only their dtype and the like."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from functools import cache
from types import CodeType, FunctionType
from typing import Any, NamedTuple, cast

from torch import nn


_DESCRIPTIONS = {"dtype", "device", "shape", "ndim", "is_meta", "is_cuda", "requires_grad", "layout", "itemsize"}
_DESCRIBING_METHODS = {"size", "dim", "numel", "stride", "element_size", "is_floating_point", "get_device"}
_DESCRIBING_FUNCTIONS = {"isinstance", "hasattr", "type", "id"}


# they run before a layer is adapted
_BEFORE_ADAPTERS = {"__init__", "_init_weights", "reset_parameters"}


def only_describes_weight(holders: Iterable[type[nn.Module]], child: str) -> bool:
    """
    Whether the code around a layer reads its weight, and only to learn its dtype, its shape or the like.

    T5 does so in each forward pass, to cast the layer's input. There the base layer's weight will do, and W' need not
    be computed. Code that cannot be read, or that hands the layer on, is taken to compute with the weight.
    """
    reads = [read for holder in holders for read in _reads_of(cast(Any, holder), child)]
    return bool(reads) and all(read.describes for read in reads)


def computes_with_weight(holders: Iterable[type[nn.Module]], child: str, parameter: str = "weight") -> bool:
    """Whether the code around a layer reads the numbers of its weight, as Mamba's does for the time step."""
    reads = (read for holder in holders for read in _reads_of(cast(Any, holder), child, parameter))
    return any(read.is_direct and not read.describes for read in reads)


class _Read(NamedTuple):
    """A place that reads a layer's weight, or the layer without calling it."""

    is_direct: bool
    describes: bool


@cache
def _reads_of(holder: Any, child: str, parameter: str = "weight") -> tuple[_Read, ...]:
    return tuple(read for function in _functions(holder) for read in _reads(function, child, parameter))


def _functions(holder: type[nn.Module]) -> Iterator[FunctionType]:
    for cls in holder.__mro__:
        if cls in (nn.Module, object):
            continue
        for name, attribute in vars(cls).items():
            function = inspect.unwrap(getattr(attribute, "__func__", attribute)) if callable(attribute) else None
            if isinstance(function, FunctionType) and name not in _BEFORE_ADAPTERS:
                yield function


def _reads(function: FunctionType, child: str, parameter: str) -> Iterator[_Read]:
    if child not in _names(function.__code__):
        return
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):
        yield _Read(False, False)
        return
    parents = {inner: outer for outer in ast.walk(tree) for inner in ast.iter_child_nodes(outer)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == child and isinstance(node.ctx, ast.Load):
            outer = parents[node]
            if isinstance(outer, ast.Attribute):
                if outer.attr == parameter:
                    yield _Read(True, _describes(outer, parents))
            elif not (isinstance(outer, ast.Call) and outer.func is node) and not _describes(node, parents):
                yield _Read(False, False)  # under another name, or by another function, its weight may be read


def _describes(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    outer = parents[node]
    if isinstance(outer, ast.Call) and isinstance(outer.func, ast.Name):
        return outer.func.id in _DESCRIBING_FUNCTIONS
    if not isinstance(outer, ast.Attribute):
        return False
    call = parents.get(outer)
    is_called = isinstance(call, ast.Call) and call.func is outer
    return outer.attr in (_DESCRIBING_METHODS if is_called else _DESCRIPTIONS)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
