# SPDX-License-Identifier: Apache-2.0
"""What the layers written here have in common: a frozen linear layer and two trained factors."""

from __future__ import annotations

import math

import torch
from torch import nn


class FactorLinear(nn.Module):
    """
    A frozen linear layer with factors A and B, kept in float32 as PEFT keeps those of a bfloat16 model.

    Subclasses cast the factors to the dtype of the weight where they use them. Casting the weight and the input to
    float32 instead, as PEFT's own LoRA and HiRA do outside autocast, would make these baselines slower.

    Args:
        linear (`nn.Linear`): The layer to adapt; its `weight` and `bias` are used, not copied.
        A_shape (`tuple[int, int]`): The shape of A, drawn Kaiming-uniform.
        B_shape (`tuple[int, int]`): The shape of B, which starts at zero.
        scaling (`float`): s = alpha / r.
    """

    def __init__(self, linear: nn.Linear, A_shape: tuple[int, int], B_shape: tuple[int, int], scaling: float) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.scaling = scaling
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        self.A = nn.Parameter(torch.empty(A_shape, dtype=dtype, device=self.weight.device))
        self.B = nn.Parameter(torch.zeros(B_shape, dtype=dtype, device=self.weight.device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def cast_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and s · B in the dtype of the weight."""
        return self.A.to(self.weight.dtype), self.B.to(self.weight.dtype) * self.scaling
