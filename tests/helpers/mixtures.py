# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts to prune, saved as their real checkpoints are, and their experts one by one."""

from __future__ import annotations

import torch
import transformers
from torch import nn

from helpers.every_model import build
from helpers.tiny import block_linears, prune_
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


def tiny_llama4() -> nn.Module:
    """A mixture of experts for texts and images."""
    text = {"hidden_size": 32, "intermediate_size": 48, "intermediate_size_mlp": 48, "num_hidden_layers": 3}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 160, "pad_token_id": 0}
    text |= {"num_local_experts": 4, "num_experts_per_tok": 1, "max_position_embeddings": 64}
    vision = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32, "image_size": 28}
    config = transformers.Llama4Config(text_config=text, vision_config=vision)
    return transformers.Llama4ForConditionalGeneration(config)


def pruned_mixture(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """One whose experts and layers are half zeros, a -0.0 and a tiny value among the others."""
    model = mixture(kind, dtype).eval()
    for weight in expert_weights(model).values():
        prune_(weight, "0.5")
        with torch.no_grad():
            weight[0, :3] = torch.tensor([-0.0, 0.0, 1e-7])
    for layer in block_linears(model).values():
        prune_(layer.weight, "0.5")
    return model
