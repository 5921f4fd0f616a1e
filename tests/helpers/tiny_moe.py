# SPDX-License-Identifier: Apache-2.0
"""Tiny mixtures of experts, built from configurations, with what is known of how they store their experts."""

from __future__ import annotations

import torch
from torch import nn

from helpers.tiny import prune_, tiny


_SETTINGS = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
}
# name -> class, settings, whether the experts are stored (in, out)
MOE = {
    "mixtral": ("MixtralForCausalLM", {**_SETTINGS, "num_local_experts": 4}, False),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {**_SETTINGS, "num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8},
        False,
    ),
    "gpt_oss": ("GptOssForCausalLM", {**_SETTINGS, "num_local_experts": 4, "head_dim": 8}, True),
}
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
IDS = torch.arange(24).view(2, 12)


def tiny_moe(name: str, seed: int = 0, pattern: str | None = None, **settings) -> nn.Module:
    """A tiny mixture, in eval mode; pruned, if a pattern is given, along the inputs of each expert."""
    class_name, defaults, _ = MOE[name]
    model = tiny(class_name, seed, **{**defaults, **settings})
    with torch.no_grad():
        for parameter in model.parameters():
            # the usual 0.02 makes logits so small that a comparison compares nothing
            parameter.normal_(std=0.2) if parameter.ndim > 1 else None
        if pattern is not None:
            for stack in oriented_experts(model, name).values():
                for weight in stack:
                    prune_(weight, pattern)
    return model


def experts(model: nn.Module) -> dict[str, torch.Tensor]:
    """The fused experts of a tiny mixture as they are stored, by the name without adapters."""
    return {
        name.replace(".base_layer", "").removeprefix("base_model.model."): parameter.detach()
        for name, parameter in model.named_parameters()
        if name.endswith((".gate_up_proj", ".down_proj"))
    }


def oriented_experts(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """The fused experts as (experts, out, in), views of the parameters."""
    transposed = MOE[name][2]
    return {key: stack.transpose(1, 2) if transposed else stack for key, stack in experts(model).items()}
