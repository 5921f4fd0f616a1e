# SPDX-License-Identifier: Apache-2.0
"""Looking into checkpoints and adapters on disk, without building the model: where the zeros sit, what was trained."""

from .adapter import AdaptedModuleInspection, AdapterInspection, inspect_adapter
from .checkpoint import CheckpointInspection, ModuleInspection, inspect_checkpoint


__all__ = [
    "AdaptedModuleInspection",
    "AdapterInspection",
    "CheckpointInspection",
    "ModuleInspection",
    "inspect_adapter",
    "inspect_checkpoint",
]
