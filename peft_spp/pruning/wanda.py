# SPDX-License-Identifier: Apache-2.0
"""Wanda (Sun et al., 2023, https://huggingface.co/papers/2306.11695): pruning by weights and activations."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..sparsity import NMPattern
from .by_block import prune_model
from .input_statistics import InputNorms
from .layers import PrunableLayer, apply_mask, weight_matrix
from .mask import pruning_mask
from .methods import PruningMethod


def prune_wanda(
    model: nn.Module,
    calibration_batches: Iterable[torch.Tensor | Mapping[str, torch.Tensor]],
    *,
    pattern: str | NMPattern | None = None,
    sparsity: float | None = None,
    target_modules: str | Iterable[str] | None = None,
    exclude_modules: str | Iterable[str] | None = None,
) -> None:
    """
    Prune the linear layers of a model with Wanda, in place.

    The score of a weight is S_ij = |W_ij| · ‖X_j‖₂, where X_j holds the values of input feature j over all
    calibration tokens. Scores are compared within each output (row of the weight) for `sparsity`, and within groups
    of M consecutive weights along the input for an N:M `pattern`.

    As in the paper's code, the model is pruned block by block, and the norms for a block are measured with the blocks
    before it already pruned. The hidden states of the calibration data are kept in memory and pushed through one
    block at a time, so that the cost is that of three forward passes.

    No cache is kept and dropout is off, whatever the model's settings, which are restored.

    The experts of a mixture are pruned as linear layers, each by the tokens that are routed to it, and by magnitude
    if these are fewer than 16. A warning names those.

    Everything is checked on the dense model, with one forward pass of the data, before the model is changed. Only if
    a block's inputs are not finite, or no token reaches a layer any more, because of the pruning of the blocks
    before it does the `ValueError` come when those have been pruned.

    Args:
        model (`nn.Module`):
            The model to prune, with one stack of transformer blocks, such as a decoder-only language model.
        calibration_batches (`Iterable`):
            The calibration data: batches of token ids, or of keyword arguments of the model's forward. Tokens that
            an `attention_mask` of shape `(batch, tokens)` marks as padding do not count: they are cut off.
        pattern (`str` or `NMPattern`, *optional*): N:M pattern such as `"2:4"`. Give either this or `sparsity`.
        sparsity (`float`, *optional*):
            Fraction of the weights of each output to prune, in [0, 1). The number is rounded to the nearest integer,
            but at least one weight of each output is kept.
        target_modules (`str` or `Iterable[str]`, *optional*):
            Which linear layers of the blocks, as in PEFT: a regular expression that the whole name must match, or
            names of which one must be the layer's name or its end. By default all of them, experts included.
        exclude_modules (`str` or `Iterable[str]`, *optional*): Layers to skip, in the same format.

    Raises:
        ValueError:
            If an argument, a weight or a calibration batch cannot be used, no token reaches a layer, or the blocks
            cannot be run one by one: the model changes the hidden states between them, shares a layer among them, or
            keeps state. The message names the layer or the batch.

    Example:

    ```py
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> from peft_spp.pruning import prune_wanda

    >>> model = AutoModelForCausalLM.from_pretrained("path/to/model")
    >>> tokenizer = AutoTokenizer.from_pretrained("path/to/model")
    >>> calibration_batches = [tokenizer(text, return_tensors="pt") for text in texts]
    >>> prune_wanda(model, calibration_batches, pattern="2:4")
    ```
    """
    method = Wanda(pattern, sparsity)
    prune_model(model, method, calibration_batches, target_modules, exclude_modules)


@dataclass(frozen=True)
class Wanda(PruningMethod):
    """Wanda, for one layer: see [`prune_wanda`]."""

    name = "Wanda"
    paper = "https://huggingface.co/papers/2306.11695"
    statistics = InputNorms

    def comparison_size(self, out_features: int, in_features: int) -> int:
        return in_features

    def prune(self, name: str, layer: PrunableLayer, statistic: torch.Tensor | None) -> None:
        assert statistic is not None
        scores = weight_matrix(layer).abs().to(statistic.dtype) * statistic
        apply_mask(layer, pruning_mask(scores, pattern=self.pattern, sparsity=self.sparsity))
