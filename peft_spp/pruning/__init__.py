# SPDX-License-Identifier: Apache-2.0
"""One-shot pruning: makes the sparse models that SPP fine-tunes."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .checkpoint import prune_checkpoint
    from .magnitude import prune_magnitude
    from .mask import pruning_mask
    from .report import PrunedModule, PruneReport
    from .sparsegpt import prune_sparsegpt
    from .wanda import prune_wanda

__all__ = [
    "PruneReport",
    "PrunedModule",
    "prune_checkpoint",
    "prune_magnitude",
    "prune_sparsegpt",
    "prune_wanda",
    "pruning_mask",
]

# imported when they are asked for: the help of `peft-spp prune` reads the options of this package without PyTorch
_MODULES = {
    "PruneReport": "report",
    "PrunedModule": "report",
    "prune_checkpoint": "checkpoint",
    "prune_magnitude": "magnitude",
    "prune_sparsegpt": "sparsegpt",
    "prune_wanda": "wanda",
    "pruning_mask": "mask",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
