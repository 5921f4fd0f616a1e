# SPDX-License-Identifier: Apache-2.0
"""One-shot pruning: makes the sparse models that SPP fine-tunes."""

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
