# SPDX-License-Identifier: Apache-2.0
"""The options of the pruning methods, apart from the methods: the command's help needs them without PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


DAMPING = 0.01
"""SparseGPT's λ, as a fraction of the mean of the Hessian's diagonal."""

BLOCK_SIZE = 128
"""How many inputs SparseGPT prunes before the weights of all later ones are brought up to date."""


def option(default: Any, help: str) -> Any:
    """A field of a method: its own option, with the help that the command prints."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class NoOptions:
    """Of a method that has only what all have."""


@dataclass(frozen=True)
class SparseGPTOptions:
    """Options of SparseGPT."""

    damping: float = option(DAMPING, "SparseGPT: damping, as a fraction of the mean of the Hessian's diagonal.")
    block_size: int = option(BLOCK_SIZE, "SparseGPT: number of inputs between two weight updates.")


OPTIONS: dict[str, type] = {"wanda": NoOptions, "magnitude": NoOptions, "sparsegpt": SparseGPTOptions}
"""The options of each method, which derives from them, by its name in `registry.METHODS`."""
