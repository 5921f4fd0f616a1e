# SPDX-License-Identifier: Apache-2.0
"""The task that the distributed runs and the run in one process have in common."""

from __future__ import annotations

from typing import Any

import torch

from peft_spp import SPPConfig


GLOBAL_BATCH = 8
STEPS = 5
ADAM = {"lr": 2e-2, "weight_decay": 0.0}


def adapter_config(**settings: Any) -> SPPConfig:
    # 48 and 16 rows do not divide by 5: the blocks are of different lengths
    return SPPConfig(r=5, task_type="CAUSAL_LM", **settings)


def token_ids(rows: int) -> torch.Tensor:
    return torch.randint(0, 64, (rows, 16), generator=torch.Generator().manual_seed(0))


def factors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Factors for an adapted model, the same in every process, and none of them zero."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(parameter.shape, generator=generator) * 0.2
        for name, parameter in model.named_parameters()
        if ".spp_" in name
    }
