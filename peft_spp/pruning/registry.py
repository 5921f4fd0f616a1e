# SPDX-License-Identifier: Apache-2.0
"""The pruning methods by name. A new one is a line here and one in `options.OPTIONS`: its options become those of
`prune_checkpoint` and of the command, and `benchmarks.pruning` measures it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ..sparsity import NMPattern
from .magnitude import Magnitude
from .methods import PruningMethod
from .sparsegpt import SparseGPT
from .wanda import Wanda


METHODS: dict[str, type[PruningMethod]] = {
    "wanda": Wanda,
    "magnitude": Magnitude,
    "sparsegpt": SparseGPT,
}


def option_names(method: type[PruningMethod]) -> tuple[str, ...]:
    """The options of a method, besides what to prune to, which all have."""
    common = {field.name for field in fields(PruningMethod)}
    return tuple(field.name for field in fields(method) if field.name not in common)


def create_method(
    name: str, pattern: str | NMPattern | None, sparsity: float | None, options: dict[str, Any]
) -> PruningMethod:
    """The method of a name, with its options; a `ValueError` or `TypeError` names what cannot be used."""
    if name not in METHODS:
        raise ValueError(f"method={name!r} is not one of {', '.join(map(repr, METHODS))}")
    known = option_names(METHODS[name])
    for option in options:
        if option not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise TypeError(f"method={name!r} has no option {option!r}: {has}")
    return METHODS[name](pattern, sparsity, **options)
