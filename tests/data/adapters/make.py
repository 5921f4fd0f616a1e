# SPDX-License-Identifier: Apache-2.0
"""Save an adapter in today's format, with what it makes of a base model. Run when the format changes:

python tests/data/adapters/make.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn


sys.path.insert(0, str(Path(__file__).parents[2]))

from peft_spp import SPPConfig


class Base(nn.Module):
    """A model whose weights depend on no random numbers, of which another PyTorch may have others."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.down_proj = nn.Linear(8, 6), nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)
        for number, parameter in enumerate(self.parameters(), 1):
            steps = torch.arange(parameter.numel(), dtype=torch.float64)
            values = ((steps * 7 + number * 3) % 11 - 5) / 8
            parameter.data = (values * (steps % 4 < 2)).reshape(parameter.shape).float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.down_proj(torch.tanh(self.q_proj(x)))))


def inputs() -> torch.Tensor:
    return (torch.arange(32).reshape(4, 8) % 5 - 2) / 4


def adapted() -> PeftModel:
    """A model with settings of many kinds: patterns, a bias, another trained module."""
    config = SPPConfig(
        r=3,
        spp_alpha=6,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 4},
        alpha_pattern={"^q_proj$": 1.5},
        bias="spp_only",
        modules_to_save=["head"],
    )
    model = get_peft_model(Base(), config)
    for number, parameter in enumerate(model.parameters()):
        if parameter.requires_grad:
            steps = torch.arange(parameter.numel(), dtype=torch.float64)
            parameter.data = (((steps * 5 + number) % 13 - 6) / 16).reshape(parameter.shape).float()
    return model.eval()


def main() -> None:
    folder = Path(__file__).parent / "saved"
    model = adapted()
    model.save_pretrained(folder)
    outputs = model(inputs()).detach()
    merged = model.merge_and_unload().state_dict()
    save_file({**merged, "outputs": outputs}, folder / "expected.safetensors")
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    print(json.dumps(sizes))


if __name__ == "__main__":
    main()
