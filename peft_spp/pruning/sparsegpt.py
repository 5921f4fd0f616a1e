# SPDX-License-Identifier: Apache-2.0
"""SparseGPT (Frantar & Alistarh, 2023, https://huggingface.co/papers/2301.00774): pruning that corrects what is left.

Removing a weight w_p of an output changes the output's squared error least if the weights that are left move by

    δ = -w_p / [H⁻¹]_pp · [H⁻¹]_:p        which costs        w_p² / [H⁻¹]_pp

(the optimal brain surgeon), where H = 2 X Xᵀ + λ I is the Hessian of the inputs. SparseGPT goes through the inputs
from the first to the last, for all outputs at once, and only moves the weights of later inputs. Then the inverses that
are needed, those of the Hessians of the inputs from p on, are all in one factor: with H⁻¹ = Uᵀ U, U upper triangular,
[H_p:⁻¹]_:p = U_pp · U_p: and [H_p:⁻¹]_pp = U_pp².
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..sparsity import NMPattern
from .by_block import prune_model
from .input_statistics import InputHessians
from .layers import PrunableLayer, weight_matrix
from .mask import pruning_mask
from .methods import PruningMethod
from .options import BLOCK_SIZE, DAMPING, SparseGPTOptions


def prune_sparsegpt(
    model: nn.Module,
    calibration_batches: Iterable[torch.Tensor | Mapping[str, torch.Tensor]],
    *,
    pattern: str | NMPattern | None = None,
    sparsity: float | None = None,
    target_modules: str | Iterable[str] | None = None,
    exclude_modules: str | Iterable[str] | None = None,
    damping: float = DAMPING,
    block_size: int = BLOCK_SIZE,
) -> None:
    """
    Prune the linear layers of a model with SparseGPT, in place.

    The score of a weight is S_ij = W_ij² / [H_j:⁻¹]_jj, where H = 2 X Xᵀ + λ I is the Hessian of the layer's inputs X
    over all calibration tokens and H_j: its part for the inputs from j on. Scores are compared within a block of
    `block_size` inputs of all outputs for `sparsity`, and within groups of M consecutive weights along the input for
    an N:M `pattern`. The weights that are left are changed so that they make up for those that are pruned.

    As in the paper's code, the model is pruned block by block, and the Hessians for a block are measured with the
    blocks before it already pruned. Everything is checked on the dense model, with one forward pass, before the model
    is changed; what can still go wrong after that is a Hessian that cannot be inverted.

    Args:
        model (`nn.Module`):
            The model to prune, with one stack of transformer blocks, such as a decoder-only language model.
        calibration_batches (`Iterable`):
            The calibration data: batches of token ids, or of keyword arguments of the model's forward. Tokens that
            an `attention_mask` of shape `(batch, tokens)` marks as padding do not count: they are cut off.
        pattern (`str` or `NMPattern`, *optional*): N:M pattern such as `"2:4"`. Give either this or `sparsity`.
        sparsity (`float`, *optional*):
            Fraction of the weights of each block of inputs to prune, in [0, 1). The number is rounded to the nearest
            integer, but at least one weight of each block is kept.
        target_modules (`str` or `Iterable[str]`, *optional*):
            Which linear layers of the blocks, as in PEFT: a regular expression that the whole name must match, or
            names of which one must be the layer's name or its end. By default all of them, experts included.
        exclude_modules (`str` or `Iterable[str]`, *optional*): Layers to skip, in the same format.
        damping (`float`, *optional*, defaults to 0.01): λ, as a fraction of the mean of the diagonal of 2 X Xᵀ.
        block_size (`int`, *optional*, defaults to 128): How many inputs are pruned before later ones are updated.

    Raises:
        ValueError:
            If an argument, a weight or a calibration batch cannot be used, no token reaches a layer, a Hessian cannot
            be inverted, or the blocks cannot be run one by one; see [`prune_wanda`].

    Example:

    ```py
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> from peft_spp.pruning import prune_sparsegpt

    >>> model = AutoModelForCausalLM.from_pretrained("path/to/model")
    >>> tokenizer = AutoTokenizer.from_pretrained("path/to/model")
    >>> calibration_batches = [tokenizer(text, return_tensors="pt") for text in texts]
    >>> prune_sparsegpt(model, calibration_batches, pattern="2:4")
    ```
    """
    method = SparseGPT(pattern, sparsity, damping, block_size)
    prune_model(model, method, calibration_batches, target_modules, exclude_modules)


@dataclass(frozen=True)
class SparseGPT(SparseGPTOptions, PruningMethod):
    """SparseGPT, for one layer: see [`prune_sparsegpt`]."""

    name = "SparseGPT"
    paper = "https://huggingface.co/papers/2301.00774"
    statistics = InputHessians

    def __post_init__(self) -> None:
        super().__post_init__()
        # The negated form also rejects NaN.
        if not 0.0 < self.damping < float("inf"):
            raise ValueError(
                f"damping should be positive and finite but the value passed is {self.damping}: H may not be "
                "invertible without it."
            )
        multiple = 1 if self.pattern is None else NMPattern.parse(self.pattern).m
        if self.block_size < 1 or self.block_size % multiple:
            raise ValueError(
                f"block_size should be a positive multiple of {multiple}, the pattern's M, but the value passed is "
                f"{self.block_size}."
            )

    def comparison_size(self, out_features: int, in_features: int) -> int:
        return out_features * min(self.block_size, in_features)

    @torch.no_grad()
    def prune(self, name: str, layer: PrunableLayer, statistic: torch.Tensor | None) -> None:
        assert statistic is not None
        weight = weight_matrix(layer)
        try:
            with torch.autocast(weight.device.type, enabled=False):
                pruned = sparsegpt_weight(
                    weight,
                    statistic,
                    pattern=self.pattern,
                    sparsity=self.sparsity,
                    damping=self.damping,
                    block_size=self.block_size,
                )
        except torch.linalg.LinAlgError as error:
            raise ValueError(
                f"The Hessian of the inputs of {name} cannot be inverted with damping={self.damping}: raise it, or "
                "calibrate with more tokens."
            ) from error
        if not pruned.isfinite().all():
            raise ValueError(f"The updated weight of {name} is not finite in {weight.dtype}: raise damping.")
        weight.copy_(pruned)


@torch.no_grad()
def sparsegpt_weight(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    *,
    pattern: str | NMPattern | None = None,
    sparsity: float | None = None,
    damping: float = DAMPING,
    block_size: int = BLOCK_SIZE,
) -> torch.Tensor:
    """Prune one weight and update what is left of it."""
    W = weight.to(hessian.dtype, copy=True)
    # An input that is always zero has no say: its weights are pruned first, and its row of H becomes that of I.
    dead = hessian.diagonal() == 0
    W[:, dead] = 0.0
    U = _inverse_factor(hessian, dead, damping)
    group = None if pattern is None else NMPattern.parse(pattern).m

    for first in range(0, W.shape[1], block_size):
        block = slice(first, min(first + block_size, W.shape[1]))
        W_block, U_block = W[:, block], U[block, block]
        columns = W_block.shape[1]
        cost = U_block.diagonal().square()
        errors = torch.zeros_like(W_block)
        if group is None:
            kept = pruning_mask(W_block.square() / cost, sparsity=sparsity, comparison_group="layer")
        else:
            kept = torch.ones_like(W_block, dtype=torch.bool)
        for j in range(columns):
            if group is not None and j % group == 0:
                here = slice(j, j + group)
                kept[:, here] = pruning_mask(W_block[:, here].square() / cost[here], pattern=pattern)
            errors[:, j] = W_block[:, j].masked_fill(kept[:, j], 0.0) / U_block[j, j]
            W_block[:, j + 1 :] -= errors[:, j, None] * U_block[j, j + 1 :]
        W[:, block.stop :] -= errors @ U[block, block.stop :]
        W_block.masked_fill_(~kept, 0.0)
    return W.to(weight.dtype)


def _inverse_factor(hessian: torch.Tensor, dead: torch.Tensor, damping: float) -> torch.Tensor:
    """U, upper triangular, with (H + λ I)⁻¹ = Uᵀ U."""
    H = hessian.clone()
    H.diagonal()[dead] = 1.0
    H.diagonal().add_(damping * H.diagonal().mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
