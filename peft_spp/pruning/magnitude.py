# SPDX-License-Identifier: Apache-2.0
"""Magnitude pruning: prune the weights with the smallest absolute values."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ..sparsity import NMPattern
from .by_block import prune_model
from .layers import PrunableLayer, apply_mask, weight_matrix
from .mask import pruning_mask
from .methods import PruningMethod


def prune_magnitude(
    model: nn.Module,
    *,
    pattern: str | NMPattern | None = None,
    sparsity: float | None = None,
    target_modules: str | Iterable[str] | None = None,
    exclude_modules: str | Iterable[str] | None = None,
) -> None:
    """
    Prune the linear layers of a model by magnitude, in place.

    The score of a weight is its absolute value. Scores are compared within the whole layer for `sparsity`, and within
    groups of M consecutive weights along the input for an N:M `pattern`. All arguments are checked before the model
    is changed.

    Args:
        model (`nn.Module`): The model to prune.
        pattern (`str` or `NMPattern`, *optional*): N:M pattern such as `"2:4"`. Give either this or `sparsity`.
        sparsity (`float`, *optional*):
            Fraction of the weights of each layer to prune, in [0, 1). The number is rounded to the nearest integer,
            but at least one weight is kept.
        target_modules (`str` or `Iterable[str]`, *optional*):
            Which linear layers, as in PEFT: a regular expression that the whole name must match, or names of which
            one must be the layer's name or its end. By default all linear layers in the transformer blocks, experts
            included.
        exclude_modules (`str` or `Iterable[str]`, *optional*): Layers to skip, in the same format.

    Example:

    ```py
    >>> from transformers import AutoModelForCausalLM
    >>> from peft_spp.pruning import prune_magnitude

    >>> model = AutoModelForCausalLM.from_pretrained("path/to/model")
    >>> prune_magnitude(model, pattern="2:4")
    ```
    """
    method = Magnitude(pattern, sparsity)
    prune_model(model, method, (), target_modules, exclude_modules)


@dataclass(frozen=True)
class Magnitude(PruningMethod):
    """Magnitude pruning, for one layer: see [`prune_magnitude`]."""

    name = "magnitude"
    paper = "https://huggingface.co/papers/1506.02626"
    statistics = None

    def comparison_size(self, out_features: int, in_features: int) -> int:
        return out_features * in_features

    def prune(self, name: str, layer: PrunableLayer, statistic: torch.Tensor | None) -> None:
        scores = weight_matrix(layer).abs()
        mask = pruning_mask(scores, pattern=self.pattern, sparsity=self.sparsity, comparison_group="layer")
        apply_mask(layer, mask)
