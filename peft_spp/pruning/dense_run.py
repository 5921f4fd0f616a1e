# SPDX-License-Identifier: Apache-2.0
"""Running calibration data through the dense model of a checkpoint, with one block in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from .block_calls import CalibrationBatch
from .calibration import check_repeatable, enter_blocks
from .calibration_data import CalibrationInputs
from .calibration_mode import calibration_mode, draws_restored
from .input_statistics import InputNorms
from .layers import PrunableLayer
from .preflight import last_block
from .skeleton import Skeleton


def enter_checkpoint(
    skeleton: Skeleton, data: Sequence[CalibrationInputs], after_batch: Callable[[], object]
) -> list[CalibrationBatch]:
    """Run calibration data through all of a model that precedes its blocks."""

    def load_first_block() -> nn.Module:
        for name in skeleton.names_of_block(0):
            skeleton.load(name)
        return skeleton.blocks[0]

    with skeleton.loaded(skeleton.names_of_stem()):
        return enter_blocks(skeleton.stem, skeleton.blocks, data, skeleton.device, load_first_block, after_batch)


@torch.no_grad()
def check_reached(
    skeleton: Skeleton,
    layers: dict[str, PrunableLayer],
    data: Sequence[CalibrationInputs],
    after_block: Callable[[], object],
) -> None:
    """
    Check that the blocks can be run one by one, and that calibration data reach each layer to prune.

    The first batch tells, but for the experts of a mixture, which may get tokens of others only.
    """
    statistics = _inputs(skeleton, layers, data[:1], after_block)
    if statistics.without_input() and len(data) > 1:
        statistics = _inputs(skeleton, layers, data, lambda: None)
    statistics.compute()


def _inputs(
    skeleton: Skeleton,
    layers: dict[str, PrunableLayer],
    data: Sequence[CalibrationInputs],
    after_block: Callable[[], object],
) -> InputNorms:
    statistics = InputNorms(layers)
    with calibration_mode(skeleton.model), draws_restored(skeleton.device):
        batches = enter_checkpoint(skeleton, data, lambda: None)
        for index in range(last_block(skeleton, layers) + 1):
            block = skeleton.blocks[index]
            with skeleton.loaded(skeleton.names_of_block(index)):
                check_repeatable(index, block, batches[0])
                with statistics:
                    for batch in batches:
                        batch.hidden_states = batch.run_block(index, block)
            after_block()
    return statistics
