# SPDX-License-Identifier: Apache-2.0
"""Adapters of parameters: of the experts of tiny mixtures, and of experts that are not Transformers'."""

from __future__ import annotations

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_spp import SPPConfig
from peft_spp.tuner import ParamWrapper

from helpers.tiny import randomize
from helpers.tiny_moe import PARAMETERS


def adapted(model: nn.Module, r: int = 4, **settings) -> PeftModel:
    """A PEFT model with random factors on all experts."""
    config = {"target_modules": [], "target_parameters": PARAMETERS, **settings}
    model = get_peft_model(model, SPPConfig(r=r, **config)).eval()
    randomize(model)
    return model


def wrappers(model: nn.Module) -> dict[str, ParamWrapper]:
    return {m.module_name: m for m in model.modules() if isinstance(m, ParamWrapper)}


class Experts(nn.Module):
    """Experts of a model that is not Transformers'."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,eoi->beo", x, self.weight)


class Holder(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.experts = Experts(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x)
