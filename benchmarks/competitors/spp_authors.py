# SPDX-License-Identifier: Apache-2.0
"""
The two forward passes of the SPP authors' code (https://github.com/Lucky-Lance/SPP), written anew from their formulas.

Both add the update to the base layer's output by a matmul of its own, and recompute that branch in the backward pass
(`torch.utils.checkpoint`) so that what it builds is not kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..harness.plots import SKY_BLUE, VERMILLION, Style
from .block_linears import replace_block_linears
from .factor_layer import FactorLinear
from .registry import competitor


Branch = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class AuthorsLinear(FactorLinear):
    """
    y = x Wᵀ + branch(x, W, A, s · B), the branch checkpointed.

    Args:
        linear (`nn.Linear`): The layer to adapt.
        branch (`Branch`): What the adapter adds to the output.
        r (`int`): The number of row blocks; it must divide the number of output features.
        alpha (`float`): s = alpha / r.

    Raises:
        ValueError: If r does not divide the number of output features.
    """

    def __init__(self, linear: nn.Linear, branch: Branch, r: int, alpha: float) -> None:
        if linear.out_features % r != 0:
            raise ValueError(f"The authors' SPP needs r={r} to divide the {linear.out_features} output features.")
        super().__init__(linear, (r, linear.in_features), (linear.out_features, 1), alpha / r)
        self.branch = branch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # nothing in the branch is random
        added = checkpoint(self._branch, x, use_reentrant=False, preserve_rng_state=False)
        return F.linear(x, self.weight, self.bias) + added

    def _branch(self, x: torch.Tensor) -> torch.Tensor:
        return self.branch(x, self.weight, *self.cast_factors())


def repeat_branch(x: torch.Tensor, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """One matmul with W ⊙ P(A) ⊙ B, where P(A) is written out by `repeat_interleave`."""
    return F.linear(x, weight * A.repeat_interleave(weight.shape[0] // A.shape[0], dim=0) * B)


def loop_branch(x: torch.Tensor, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """A matmul of x ⊙ A[k] with the rows of W in block k, for every k; the whole times B."""
    blocks = weight.chunk(A.shape[0], dim=0)
    return torch.cat([F.linear(x * A[k], block) for k, block in enumerate(blocks)], dim=-1) * B.squeeze(1)


@competitor("spp_authors_repeat", Style("SPP authors, repeat", VERMILLION, "<"))
def adapt_spp_authors_repeat(model: nn.Module) -> nn.Module:
    """The SPP authors' forward with a second weight, r = 16, alpha = 32."""
    return replace_block_linears(model, lambda linear: AuthorsLinear(linear, repeat_branch, r=16, alpha=32))


@competitor("spp_authors_loop", Style("SPP authors, loop", SKY_BLUE, ">"))
def adapt_spp_authors_loop(model: nn.Module) -> nn.Module:
    """The SPP authors' forward in r parts, r = 16, alpha = 32."""
    return replace_block_linears(model, lambda linear: AuthorsLinear(linear, loop_branch, r=16, alpha=32))
