# SPDX-License-Identifier: Apache-2.0
"""Tiny pruned models on disk, and what their tensors have to be."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from helpers.tiny import block_linears, prune_, tiny_llama


IDS = torch.arange(24).view(2, 12)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pruned_llama(dtype: torch.dtype = torch.float32, pattern: str = "0.5", **settings) -> nn.Module:
    """A pruned Llama with a -0.0 and a tiny value in each weight, which are easily lost."""
    model = tiny_llama(**settings)
    for layer in block_linears(model).values():
        nn.init.normal_(layer.weight, std=0.2)
        prune_(layer.weight, pattern)
        with torch.no_grad():
            layer.weight[0, :3] = torch.tensor([-0.0, 0.0, 1e-30])
    return model.to(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(INTEGERS[tensor.element_size()])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: one for file in sorted(folder.glob("*.safetensors")) for name, one in load_file(file).items()}
