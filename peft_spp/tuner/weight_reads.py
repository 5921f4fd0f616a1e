# SPDX-License-Identifier: Apache-2.0
"""What a module reads of the weight of one of its layers: the numbers, or only their dtype and the like."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType

from torch import nn


_DESCRIPTIONS = {"dtype", "device", "shape", "ndim", "is_meta", "is_cuda", "requires_grad", "layout", "itemsize"}
_DESCRIBING_METHODS = {"size", "dim", "numel", "stride", "element_size", "is_floating_point", "get_device"}
_DESCRIBING_FUNCTIONS = {"isinstance", "hasattr", "type", "id"}


@cache
def only_describes_weight(parent: type[nn.Module], child: str) -> bool:
    """
    Whether a class reads the weight of one of its layers, and only to learn its dtype, its shape or the like.

    T5 does so in each forward pass, to cast the layer's input. There the base layer's weight will do, and W' need not
    be computed. Code that cannot be read is taken to compute with the weight.

    Args:
        parent (`type[nn.Module]`): The class of the module that holds the layer.
        child (`str`): The name of the layer in it.
    """
    reads = [read for function in _functions(parent) for read in _reads(function, child)]
    return bool(reads) and all(reads)


def _functions(parent: type[nn.Module]) -> Iterator[FunctionType]:
    for cls in parent.__mro__:
        if cls in (nn.Module, object):
            continue
        for attribute in vars(cls).values():
            function = inspect.unwrap(getattr(attribute, "__func__", attribute)) if callable(attribute) else None
            if isinstance(function, FunctionType):
                yield function


def _reads(function: FunctionType, child: str) -> Iterator[bool]:
    """For each read of the weight in a function, whether it only describes it."""
    if not {child, "weight"} <= set(_names(function.__code__)):
        return
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):
        yield False
        return
    parents = {inner: outer for outer in ast.walk(tree) for inner in ast.iter_child_nodes(outer)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "weight":
            if isinstance(node.value, ast.Attribute) and node.value.attr == child:
                yield _describes(node, parents)


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
