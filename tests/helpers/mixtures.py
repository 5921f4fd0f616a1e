# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts to prune, saved as their real checkpoints are, and their experts one by one."""

from __future__ import annotations

import torch
from torch import nn

from helpers.every_model import build
from helpers.tiny_moe import MOE, tiny_moe


# model type -> whether a checkpoint has a tensor for each expert, or one for all
SAVED_ONE_BY_ONE = {
    "mixtral": True,
    "qwen2_moe": True,
    "qwen3_moe": True,
    "olmoe": True,
    "deepseek_v3": True,
    "gpt_oss": False,
    "llama4_text": False,
}
INPUTS_FIRST = ("GptOssExperts", "Llama4TextExperts", "AriaExperts", "OpenAIPrivacyFilterExperts")


def mixture(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny mixture with weights so large that each layer matters."""
    if kind in MOE:
        model = tiny_moe(kind)
    else:
        torch.manual_seed(0)
        model = build(kind).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.2) if parameter.ndim > 1 else None
    model.to(dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # in float32 in checkpoints, whatever the rest is in
            buffer.data = torch.linspace(-0.1, 0.1, len(buffer))
    return model


def batches(vocabulary: int = 60) -> list[torch.Tensor]:
    """Calibration data that reaches most experts of a tiny mixture often."""
    return [torch.randint(3, vocabulary, (2, 48), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


def expert_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weight of each expert as `(out, in)`, a view, by the name of its stack and its number."""
    found = {}
    for name, module in model.named_modules():
        for own_name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and name.endswith("experts"):
                stack = parameter.detach().mT if type(module).__name__ in INPUTS_FIRST else parameter.detach()
                found |= {f"{name}.{own_name}.{index}": weight for index, weight in enumerate(stack)}
    return found


def most_in_a_group(weight: torch.Tensor, size: int = 4) -> int:
    """The most weights that are not zero in a group of consecutive inputs."""
    return int((weight.reshape(-1, size) != 0).sum(dim=1).max())
