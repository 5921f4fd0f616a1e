# SPDX-License-Identifier: Apache-2.0
"""Wanda (Sun et al., 2023, https://huggingface.co/papers/2306.11695): pruning by weights and activations."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ..sparsity import NMPattern
from .calibration import CalibrationBatch, InputNorms, calibration_mode, run_calibration
from .layers import LinearLayer, apply_mask, check_prunable, find_blocks, find_target_layers, weight_matrix
from .mask import check_pruning_request, pruning_mask


@torch.no_grad()
def prune_wanda(
    model: nn.Module,
    calibration_batches: Iterable[torch.Tensor | Mapping[str, torch.Tensor]],
    *,
    pattern: str | NMPattern | None = None,
    sparsity: float | None = None,
    target_modules: str | Iterable[str] | None = None,
) -> None:
    """
    Prune the linear layers of a model with Wanda, in place.

    The score of a weight is S_ij = |W_ij| · ‖X_j‖₂, where X_j holds the values of input feature j over all
    calibration tokens. Scores are compared within each output (row of the weight) for `sparsity`, and within groups
    of M consecutive weights along the input for an N:M `pattern`.

    As in the paper's code, the model is pruned block by block, and the norms for a block are measured with the blocks
    before it already pruned. The hidden states of the calibration data are kept in memory and pushed through one
    block at a time, so that the cost is that of three forward passes.

    Everything is checked on the dense model, with one forward pass, before the model is changed. Only if a block's
    inputs are not finite because of the pruning of the blocks before it does the `ValueError` come when those have
    been pruned.

    Args:
        model (`nn.Module`):
            The model to prune, with one stack of transformer blocks, such as a decoder-only language model.
        calibration_batches (`Iterable`):
            The calibration data: batches of token ids, or of keyword arguments of the model's forward. Tokens that
            an `attention_mask` marks as padding do not count.
        pattern (`str` or `NMPattern`, *optional*): N:M pattern such as `"2:4"`. Give either this or `sparsity`.
        sparsity (`float`, *optional*): Fraction of the weights of each output to prune, in [0, 1).
        target_modules (`str` or `Iterable[str]`, *optional*):
            Which linear layers of the blocks, as in PEFT: a regular expression that the whole name must match, or
            names of which one must be the layer's name or its end. By default all of them.

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
    check_pruning_request(pattern, sparsity)
    blocks_name, blocks = find_blocks(model)
    layers = find_target_layers(model, target_modules)
    check_prunable(layers, pattern)
    for name in layers:
        if not name.startswith(f"{blocks_name}."):
            raise ValueError(
                f"{name} is not in the transformer blocks ({blocks_name}), which is all that Wanda prunes."
            )

    with calibration_mode(model):
        dense_norms = InputNorms(layers)
        batches = run_calibration(model, blocks, calibration_batches, dense_norms)
        # These norms are not used, as the blocks will get other inputs: this checks them before anything is changed.
        dense_norms.compute()

        for index, block in enumerate(blocks):
            prefix = f"{blocks_name}.{index}."
            block_layers = {name: layer for name, layer in layers.items() if name.startswith(prefix)}
            for name, input_norms in _measure(index, block, block_layers, batches).items():
                scores = weight_matrix(layers[name]).abs().float() * input_norms
                apply_mask(layers[name], pruning_mask(scores, pattern=pattern, sparsity=sparsity))
            for batch in batches:
                batch.hidden_states = batch.run_block(index, block)


def _measure(
    index: int, block: nn.Module, layers: dict[str, LinearLayer], batches: list[CalibrationBatch]
) -> dict[str, torch.Tensor]:
    """Run the block numbered `index` on all batches, and return the norms of the inputs of its `layers`."""
    norms = InputNorms(layers)
    with norms:
        for batch in batches:
            norms.token_mask = batch.token_mask
            batch.run_block(index, block)
    return norms.compute()
