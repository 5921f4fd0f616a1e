# SPDX-License-Identifier: Apache-2.0
"""Tiny models that the tests build from configurations."""

from __future__ import annotations

import torch
import transformers
from torch import nn


LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


class MLP(nn.Module):
    def __init__(self, n: int = 12, bias: bool = True) -> None:
        super().__init__()
        self.lin0 = nn.Linear(n, 20, bias=bias)
        self.relu = nn.ReLU()
        self.lin1 = nn.Linear(20, 6, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin1(self.relu(self.lin0(x)))


def tiny(class_name: str, seed: int = 0, **settings) -> nn.Module:
    """A random model of a Transformers class, in eval mode."""
    torch.manual_seed(seed)
    cls = getattr(transformers, class_name)
    return cls(cls.config_class(**settings)).eval()


def tiny_llama(seed: int = 0, **settings) -> nn.Module:
    return tiny("LlamaForCausalLM", seed, **{**LLAMA, **settings})


def prune_(weight: torch.Tensor, pattern: str) -> None:
    """Zero random places of a (rows, inputs) weight: "2:4" and the like along the inputs, or a share such as "0.5"."""
    rows, inputs = weight.shape
    if ":" in pattern:
        n, m = (int(part) for part in pattern.split(":"))
        keep = torch.rand(rows, inputs // m, m).argsort(-1) < n
        mask = ~keep.reshape(rows, inputs)
    else:
        mask = torch.rand(rows, inputs) < float(pattern)
    with torch.no_grad():
        weight[mask] = 0.0


def masked_llama(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny Llama, always with the same weights, half of which in the blocks are pruned as the seed says."""
    model = tiny_llama().to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "layers" in name and weight.dim() == 2:
            weight.data[torch.rand(weight.shape, generator=generator) < 0.5] = 0.0
    return model


def block_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers inside the blocks of a tiny Llama, without their adapters."""
    return {
        name.replace(".base_layer", "").removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name and ".spp_" not in name and "lora_" not in name
    }


def is_positive_zero(t: torch.Tensor) -> torch.Tensor:
    return (t == 0) & ~t.signbit()


def randomize(model: nn.Module, scale: float = 0.5, adapter: str | None = None) -> None:
    """Draw all factors at random, as training with a large learning rate may leave them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".spp_" in name and (adapter is None or f".{adapter}." in name):
                parameter.normal_(std=scale)
