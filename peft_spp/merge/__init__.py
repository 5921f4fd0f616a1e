# SPDX-License-Identifier: Apache-2.0
"""Merging an SPP adapter into a checkpoint on disk, file by file, without building the model.

[`merge_checkpoint`] gives the bits of `merge_and_unload` and `save_pretrained`, needs a few hundred megabytes for a
model of any size, and leaves either the whole merged model or nothing.
"""

from .report import MergedModule, MergeReport
from .run import merge_checkpoint


__all__ = ["MergeReport", "MergedModule", "merge_checkpoint"]
