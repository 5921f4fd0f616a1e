# SPDX-License-Identifier: Apache-2.0
"""Running calibration data through a model, whole or up to its blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ..error_text import message
from .block_calls import (
    BY_MAGNITUDE,
    CalibrationBatch,
    check_independent,
    entering_states,
    negated_outputs,
    record_block_calls,
    split_hidden_states,
)
from .calibration_data import CalibrationInputs
from .calibration_mode import accepts, draws_restored
from .input_statistics import InputStatistics


@torch.no_grad()
def run_calibration(
    model: nn.Module, blocks: nn.ModuleList, data: Iterable[CalibrationInputs], statistics: InputStatistics
) -> list[CalibrationBatch]:
    """
    Run the whole model on the calibration data, recording what its blocks are called with.

    Only the hidden states that enter the first block are stored (one tensor for each batch); masks and position
    embeddings are shared by the blocks as in the model itself. The first batch is run again block by block, which must
    give the same: a cache, randomness or any other state between calls would change it.
    """
    # the embeddings may be offloaded, and what is pruned is not
    device = next(parameter.device for parameter in model.parameters() if not parameter.is_meta)
    calibration: list[CalibrationBatch] = []
    for inputs in data:
        arguments = _model_arguments(model, blocks, inputs, device)
        batch = CalibrationBatch()
        with statistics, record_block_calls(blocks, batch) as outputs:
            _call(model, arguments)
        if not calibration:
            with draws_restored(device):
                again = batch.rerun(blocks)
            if not same_output(again, outputs[0]):
                raise ValueError(
                    "The model's blocks, run one by one, do not give the output of the model's forward: they keep "
                    f"state between calls, or are random. {BY_MAGNITUDE}"
                )
            _check_arguments(model, blocks, arguments, batch, device)
        calibration.append(batch)
    return calibration


@torch.no_grad()
def enter_blocks(
    stem: nn.Module,
    blocks: nn.ModuleList,
    data: Iterable[CalibrationInputs],
    device: torch.device,
    first_block: Callable[[], nn.Module],
    after_batch: Callable[[], object],
) -> list[CalibrationBatch]:
    """
    Run all of a model but its blocks on the calibration data, recording what the blocks would be called with.

    The blocks hold no data. In their places the hidden states pass unchanged, so what is recorded is right for models
    whose masks and position embeddings do not depend on them, which is checked on the first batch.
    """
    calibration: list[CalibrationBatch] = []
    skipped = _SkippedBlocks(first_block)
    with skipped.in_place_of(blocks):
        for inputs in data:
            arguments = _model_arguments(stem, blocks, inputs, device)
            batch = CalibrationBatch()
            with record_block_calls(blocks, batch):
                _call(stem, arguments)
            skipped.check_unused(batch)
            if not calibration:
                _check_arguments(stem, blocks, arguments, batch, device)
            calibration.append(batch)
            after_batch()
    return calibration


@torch.no_grad()
def check_repeatable(index: int, block: nn.Module, batch: CalibrationBatch) -> None:
    """Raise a `ValueError` if `block`, the one numbered `index`, gives another output when it is run again."""
    if not same_output(batch.run_block(index, block), batch.run_block(index, block)):
        raise ValueError(
            f"Block {index} gives a different output when it runs again on the same data: it keeps state between "
            f"calls, or is random. {BY_MAGNITUDE}"
        )


def same_output(output: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two outputs of one computation are the same, up to the order of additions on an accelerator."""
    if output.shape != expected.shape:
        return False
    if not expected.isfinite().all():
        return not output.isfinite().all()  # the statistics name the layer
    difference, norm = (output.double() - expected.double()).norm(), expected.double().norm()
    return bool(difference <= norm * max(1e-5, torch.finfo(expected.dtype).eps))


def _check_arguments(
    model: nn.Module, blocks: nn.ModuleList, arguments: dict[str, Any], batch: CalibrationBatch, device: torch.device
) -> None:
    changed = CalibrationBatch()
    with draws_restored(device), negated_outputs(blocks), record_block_calls(blocks, changed):
        model(**arguments)
    check_independent(batch, changed)


def _call(model: nn.Module, arguments: dict[str, Any]) -> None:
    try:
        model(**arguments)
    except (RuntimeError, IndexError, TypeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()})
        cause = "" if dtypes == ["float32"] else "Some models work in float32 only. "
        if isinstance(error, IndexError):
            tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
            cause = (
                f"The batch ({shapes}) may have too many tokens in a sequence (lower sequence_length), or ids of "
                "tokens that the model has no embeddings for. "
            )
        raise ValueError(
            f"{type(model).__name__}, with weights in {' and '.join(dtypes)}, cannot be called with the calibration "
            f"data: {message(error)}. {cause}Try model(**batch) without pruning."
        ) from error


def _model_arguments(
    model: nn.Module, blocks: nn.ModuleList, inputs: CalibrationInputs, device: torch.device
) -> dict[str, Any]:
    """
    What to call the model with.

    Where padding on the left was cut off, the tokens have to be what they are behind it: a model may count positions
    from the start of the padding.
    """
    arguments = _on_device(model, inputs.arguments, device)
    if inputs.padded is None:
        return arguments
    choices = [arguments]
    if accepts(model, "position_ids") and "position_ids" not in arguments:
        positions = torch.arange(inputs.columns.start, inputs.columns.stop, device=device)
        choices.append(arguments | {"position_ids": positions.expand(len(inputs.rows), -1)})
    with draws_restored(device):
        padded = entering_states(model, blocks, _on_device(model, inputs.padded, device))
    if padded.shape[:2] == inputs.padded["attention_mask"].shape:
        expected = padded[inputs.rows, inputs.columns]
        for choice in choices:
            with draws_restored(device):
                entering = entering_states(model, blocks, choice)
            if same_output(entering, expected):
                return choice
    raise ValueError(
        f"Left padding changes the output of {type(model).__name__} for the tokens of a calibration batch. Pad on "
        "the right, or pass sequences without padding."
    )


def _on_device(model: nn.Module, arguments: dict[str, Any], device: torch.device) -> dict[str, Any]:
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    return moved | ({"use_cache": False} if accepts(model, "use_cache") else {})


class _SkippedBlocks:
    """Stands for blocks whose output is their input, in a tuple if the blocks return one."""

    def __init__(self, first_block: Callable[[], nn.Module]) -> None:
        self._first_block = first_block
        # what a block returns besides the hidden states, with `_unknown` for what is not known here
        self._others: list[torch.Tensor | None] | None = None
        self._is_called = False
        self._unknown = torch.empty(0)

    def _forward(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        hidden_states, _, _ = split_hidden_states(block, args, kwargs)
        if not self._is_called:
            first_block = self._first_block()
            output = type(first_block).forward(first_block, *args, **kwargs)
            if isinstance(output, (tuple, list)):
                self._others = [None if one is None else self._unknown for one in output[1:]]
            self._is_called = True
        return hidden_states if self._others is None else (hidden_states, *self._others)

    def check_unused(self, batch: CalibrationBatch) -> None:
        """Raise a `ValueError` if a block is called with what another would have returned."""
        for index, (args, kwargs) in enumerate(batch.block_arguments):
            if any(value is self._unknown for value in (*args, *kwargs.values())):
                raise ValueError(
                    f"Block {index} takes an output of the previous block other than the hidden states, so the model "
                    "cannot be pruned block by block from disk. Load the model with from_pretrained, prune it in "
                    "memory, and save it with save_pretrained instead."
                )

    @contextmanager
    def in_place_of(self, blocks: nn.ModuleList) -> Iterator[None]:
        """While active, calling a block does not compute it."""
        for block in blocks:
            block.forward = partial(self._forward, block)
        try:
            yield
        finally:
            for block in blocks:
                del block.forward
