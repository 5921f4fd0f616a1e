# SPDX-License-Identifier: Apache-2.0
"""Other ways to train a pruned model that keep its zeros: a masked update of the weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..harness.plots import GREEN, PURPLE, Style
from .block_linears import replace_block_linears
from .factor_layer import FactorLinear
from .registry import competitor


class MaskedLoRALinear(FactorLinear):
    """
    y = x (W + s · (B A) ⊙ M)ᵀ with M = (W ≠ 0): a LoRA merged under the mask on every call, by plain autograd.

    This is the update of SQFT's SparsePEFT (https://arxiv.org/abs/2410.03750). The mask is computed once and kept.

    Args:
        linear (`nn.Linear`): The layer to adapt.
        r (`int`): The rank of the update.
        alpha (`float`): s = alpha / r.
    """

    mask: torch.Tensor

    def __init__(self, linear: nn.Linear, r: int, alpha: float) -> None:
        super().__init__(linear, (r, linear.in_features), (linear.out_features, r), alpha / r)
        self.register_buffer("mask", linear.weight != 0, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        A, B = self.cast_factors()
        return F.linear(x, self.weight + (B @ A) * self.mask, self.bias)


class MaskedFullLinear(nn.Module):
    """
    y = x Wᵀ with a trained W whose gradient is set to zero where W was zero.

    The weight is trained in the dtype that the model has; a float32 copy of it, as mixed precision training keeps one,
    would take more memory.

    Args:
        linear (`nn.Linear`): The layer to adapt. Its weight is copied, since others may share it.
    """

    mask: torch.Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().clone())
        self.bias = linear.bias
        self.register_buffer("mask", linear.weight != 0, persistent=False)
        self.weight.register_post_accumulate_grad_hook(self._mask_gradient)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)

    def _mask_gradient(self, weight: torch.Tensor) -> None:
        assert weight.grad is not None
        weight.grad.mul_(self.mask)


@competitor("masked_lora", Style("Masked LoRA, r=16", GREEN, "D"))
def adapt_masked_lora(model: nn.Module) -> nn.Module:
    """LoRA merged under the mask on the fly, r = 16, alpha = 32."""
    return replace_block_linears(model, lambda linear: MaskedLoRALinear(linear, r=16, alpha=32))


@competitor("masked_full", Style("Masked full fine-tuning", PURPLE, "P"))
def adapt_masked_full(model: nn.Module) -> nn.Module:
    """Full fine-tuning of the weights of the linear layers, their gradients masked."""
    return replace_block_linears(model, MaskedFullLinear)
