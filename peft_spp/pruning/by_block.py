# SPDX-License-Identifier: Apache-2.0
"""Pruning a model in memory: block by block, each by what it gets once the blocks before it are pruned."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn

from ..reports import some
from .block_calls import CalibrationBatch
from .calibration import run_calibration
from .calibration_data import calibration_inputs
from .calibration_mode import calibration_mode
from .experts import Expert
from .input_statistics import FEW_TOKENS, InputNorms, InputStatistics
from .layers import PrunableLayer, check_prunable, check_unshared, find_blocks, find_target_layers
from .methods import PruningMethod


@torch.no_grad()
def prune_model(
    model: nn.Module,
    method: PruningMethod,
    calibration_batches: Iterable[torch.Tensor | Mapping[str, torch.Tensor]] = (),
    target_modules: str | Iterable[str] | None = None,
    exclude_modules: str | Iterable[str] | None = None,
) -> None:
    """
    Prune the linear layers of a model in place: block by block with a method that needs calibration data.

    Everything is checked on the dense model, with one forward pass, before the model is changed.
    """
    layers = find_target_layers(model, target_modules, exclude_modules)
    if method.statistics is None:
        check_prunable(layers, method.pattern)
        method.check_sparsity(layers)
        _prune_layers(method, layers, dict.fromkeys(layers))
        return
    blocks_name, blocks = find_blocks(model, layers)
    check_prunable(layers, method.pattern)
    method.check_sparsity(layers)
    check_in_blocks(layers, blocks_name, method)
    check_unshared(model, layers)

    with calibration_mode(model):
        # These are not used, as the blocks will get other inputs: this checks them before anything is changed. Norms
        # do for all methods; Hessians of all layers at once, and of all experts, would take too much memory.
        dense = InputNorms(layers)
        batches = run_calibration(model, blocks, calibration_inputs(calibration_batches), dense)
        dense.compute()
        del dense

        rarely_reached: list[str] = []
        for index, block in enumerate(blocks):
            rarely_reached += prune_block(method, index, block, layers_of_block(layers, blocks_name, index), batches)
    warn_of_rarely_reached(rarely_reached, layers)


def check_in_blocks(names: Iterable[str], blocks_name: str, method: PruningMethod) -> None:
    """Raise a `ValueError` that names the first layer outside of the blocks."""
    for name in names:
        if not name.startswith(f"{blocks_name}."):
            raise ValueError(
                f"{name} is outside the transformer blocks ({blocks_name}), and {method.name} prunes only layers "
                "inside them. Remove it from target_modules, or prune it by magnitude."
            )


def layers_of_block(layers: dict[str, PrunableLayer], blocks_name: str, index: int) -> dict[str, PrunableLayer]:
    """The layers that are in the block numbered `index`."""
    return {name: layer for name, layer in layers.items() if name.startswith(f"{blocks_name}.{index}.")}


@torch.no_grad()
def prune_block(
    method: PruningMethod,
    index: int,
    block: nn.Module,
    layers: dict[str, PrunableLayer],
    batches: list[CalibrationBatch],
    after_batch: Callable[[], object] = lambda: None,
) -> list[str]:
    """
    Prune one block by the inputs of its layers, and push the calibration data through it.

    It returns the experts that too few tokens have reached.
    """
    assert method.statistics is not None
    rarely_reached: list[str] = []
    if layers:
        statistics: InputStatistics = method.statistics(layers)
        with statistics:
            for batch in batches:
                batch.run_block(index, block)
                after_batch()
        rarely_reached = statistics.rarely_reached()
        _prune_layers(method, layers, statistics.compute())
        del statistics
    for batch in batches:
        batch.hidden_states = batch.run_block(index, block)
        after_batch()
    return rarely_reached


def _prune_layers(
    method: PruningMethod, layers: Mapping[str, PrunableLayer], statistics: Mapping[str, torch.Tensor | None]
) -> None:
    for name, statistic in statistics.items():
        method.prune(name, layers[name], statistic)
    # or else autocast would go on with the dense weights that it has cast before
    torch.clear_autocast_cache()


def warn_of_rarely_reached(names: Sequence[str], layers: Mapping[str, PrunableLayer]) -> None:
    """Warn of experts that were pruned by magnitude since too few calibration tokens have reached them."""
    if names:
        experts = sum(isinstance(layer, Expert) for layer in layers.values())
        warnings.warn(
            f"Fewer than {FEW_TOKENS} calibration tokens reached {len(names)} of the {experts} expert weights, so "
            f"these were pruned by magnitude: {some(names)}. Calibrate with more or other data to avoid that.",
            stacklevel=4,
        )
