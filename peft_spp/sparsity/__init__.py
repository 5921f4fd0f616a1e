# SPDX-License-Identifier: Apache-2.0
"""Which weights of a model or checkpoint are zero, in which pattern, and which zeros a change has lost.

[`sparsity_report`] and [`compare_sparsity`] read a model, a state dict, or a safetensors file or folder. They read one
tensor at a time and look at its bits, so `-0.0` differs from `0.0`.
"""

from .base_masks import BaseRecord, record_checkpoint, relate_checkpoint
from .compare import ModuleComparison, SparsityComparison, compare_sparsity
from .mask_record import MaskRecord, MaskRelation, record_mask
from .pattern import NMPattern, satisfies_n_m
from .report import ModuleSparsity, SparsityReport, sparsity_report


__all__ = [
    "BaseRecord",
    "MaskRecord",
    "MaskRelation",
    "ModuleComparison",
    "ModuleSparsity",
    "NMPattern",
    "SparsityComparison",
    "SparsityReport",
    "compare_sparsity",
    "record_checkpoint",
    "record_mask",
    "relate_checkpoint",
    "satisfies_n_m",
    "sparsity_report",
]
