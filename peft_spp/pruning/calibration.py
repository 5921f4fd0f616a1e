# SPDX-License-Identifier: Apache-2.0
"""Running calibration data through a model, whole or block by block, and measuring the inputs of its linear layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .layers import LinearLayer


class InputStatistics(ABC):
    """
    Accumulates what a method wants to know of the inputs of several linear layers over all calibration tokens.

    Use it as a context manager: while it is active, forward hooks on the layers add what passes through them.

    Args:
        layers (`dict[str, LinearLayer]`): The layers to observe by their names.
    """

    def __init__(self, layers: dict[str, LinearLayer]) -> None:
        self._layers = layers
        self._sums: dict[str, torch.Tensor] = {}
        self._hooks = ExitStack()
        # Which tokens of the batch that is run now are not padding; `None` if all of them count.
        self.token_mask: torch.Tensor | None = None

    @abstractmethod
    def of_features(self, features: torch.Tensor) -> torch.Tensor:
        """What some tokens add to the sum, given their inputs of shape `(tokens, in_features)`."""

    def __enter__(self) -> InputStatistics:
        for name, layer in self._layers.items():
            self._hooks.enter_context(layer.register_forward_pre_hook(self._make_hook(name)))
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.close()

    def _make_hook(self, name: str) -> Any:
        def add_inputs(layer: LinearLayer, inputs: tuple[torch.Tensor, ...]) -> None:
            features = inputs[0].detach()
            if self.token_mask is not None and features.shape[:-1] == self.token_mask.shape:
                features = features[self.token_mask.to(features.device)]
            added = self.of_features(features.reshape(-1, features.shape[-1]))
            if name in self._sums:
                # in place: a Hessian may take hundreds of megabytes
                self._sums[name] += added
            else:
                self._sums[name] = added

        return add_inputs

    def compute(self) -> dict[str, torch.Tensor]:
        """
        Check and return the sums.

        Returns:
            `dict[str, torch.Tensor]`: What was added up for each layer.

        Raises:
            ValueError: If nothing has reached a layer, or its inputs are not finite.
        """
        for name in self._layers:
            if name not in self._sums:
                raise ValueError(f"No calibration data reached {name}: cannot tell the importance of its weights.")
            if not self._sums[name].isfinite().all():
                raise ValueError(f"The calibration inputs of {name} are not finite, or too large to be squared.")
        return dict(self._sums)


class InputNorms(InputStatistics):
    """
    Accumulates ‖X_j‖₂, the norm over all calibration tokens of each input feature j, for several linear layers.

    The squares are accumulated in float32 whatever the dtype of the model.

    Args:
        layers (`dict[str, LinearLayer]`): The layers to observe by their names.
    """

    def of_features(self, features: torch.Tensor) -> torch.Tensor:
        return features.float().square().sum(dim=0)

    def compute(self) -> dict[str, torch.Tensor]:
        """
        Check and return the norms.

        Returns:
            `dict[str, torch.Tensor]`: A float32 vector of `in_features` norms for each layer.
        """
        return {name: squares.sqrt() for name, squares in super().compute().items()}


class InputHessians(InputStatistics):
    """
    Accumulates 2 X Xᵀ, the Hessian of the squared error of each output, for several linear layers.

    Args:
        layers (`dict[str, LinearLayer]`): The layers to observe by their names.
    """

    def of_features(self, features: torch.Tensor) -> torch.Tensor:
        # float32, but for models in float64
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        return 2 * features.T @ features


@dataclass
class CalibrationBatch:
    """
    A batch of calibration data on its way through the blocks.

    Args:
        token_mask (`torch.Tensor`, *optional*): Boolean mask of the tokens that are not padding.
        hidden_states (`torch.Tensor`): The inputs of the block that is next.
        block_arguments (`list`):
            What each block is called with besides the hidden states, positional and by keyword: attention masks,
            position embeddings and so on.
    """

    token_mask: torch.Tensor | None
    hidden_states: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    block_arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def run_block(self, index: int, block: nn.Module) -> torch.Tensor:
        """Run `block`, the one numbered `index`, on the hidden states, and return its output."""
        args, kwargs = self.block_arguments[index]
        return _first(block(self.hidden_states, *args, **kwargs))


@torch.no_grad()
def run_calibration(
    model: nn.Module,
    blocks: nn.ModuleList,
    batches: Iterable[torch.Tensor | Mapping[str, torch.Tensor]],
    statistics: InputStatistics,
) -> list[CalibrationBatch]:
    """
    Run the whole model on the calibration data, recording what its blocks are called with.

    Only the hidden states that enter the first block are stored (one tensor for each batch); masks and position
    embeddings are shared by the blocks as in the model itself.

    Args:
        model (`nn.Module`): The model.
        blocks (`nn.ModuleList`): Its transformer blocks.
        batches (`Iterable`): Batches of token ids, or of keyword arguments of the model's forward.
        statistics (`InputStatistics`): Gets the inputs of its layers.

    Returns:
        `list[CalibrationBatch]`: The batches, ready to be run through the first block.
    """
    device = next(model.parameters()).device
    calibration: list[CalibrationBatch] = []
    for inputs in batches:
        model_inputs, batch = _new_batch(inputs, device)
        statistics.token_mask = batch.token_mask
        with statistics, _record_block_arguments(blocks, batch):
            model(**model_inputs)
        if len(batch.block_arguments) != len(blocks):
            raise ValueError("The model's forward does not run each of its blocks once: cannot go block by block.")
        calibration.append(batch)
    if not calibration:
        raise ValueError("There is no calibration data: calibration_batches is empty.")
    return calibration


@torch.no_grad()
def enter_blocks(
    stem: nn.Module,
    blocks: nn.ModuleList,
    batches: Iterable[torch.Tensor | Mapping[str, torch.Tensor]],
    device: torch.device,
    first_block: Callable[[], nn.Module],
    after_batch: Callable[[], object],
) -> list[CalibrationBatch]:
    """
    Run all of a model but its blocks on the calibration data, recording what the blocks would be called with.

    The blocks hold no data. In their places the hidden states pass unchanged, so what is recorded is right for models
    whose masks and position embeddings do not depend on them.

    Args:
        stem (`nn.Module`): The model without its head; all but the blocks is loaded.
        blocks (`nn.ModuleList`): Its transformer blocks, on the meta device.
        batches (`Iterable`): Batches of token ids, or of keyword arguments of the model's forward.
        device (`torch.device`): Where the stem is.
        first_block (`Callable[[], nn.Module]`): Gives the first block with its weights; called once.
        after_batch (`Callable[[], object]`): Called after each batch.

    Returns:
        `list[CalibrationBatch]`: The batches, ready to be run through the first block.
    """
    calibration: list[CalibrationBatch] = []
    skipped = _SkippedBlocks(first_block)
    with skipped.in_place_of(blocks):
        for inputs in batches:
            model_inputs, batch = _new_batch(inputs, device)
            with _record_block_arguments(blocks, batch):
                stem(**model_inputs)
            if len(batch.block_arguments) != len(blocks):
                raise ValueError("The model's forward does not run each of its blocks once: cannot go block by block.")
            calibration.append(batch)
            after_batch()
    if not calibration:
        raise ValueError("There is no calibration data: calibration_batches is empty.")
    return calibration


class _SkippedBlocks:
    """Stands for blocks whose output is their input, in a tuple if the blocks return one."""

    def __init__(self, first_block: Callable[[], nn.Module]) -> None:
        self._first_block = first_block
        self._others: int | None = None

    def _forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._others is None:
            block = self._first_block()
            output = type(block).forward(block, hidden_states, *args, **kwargs)
            self._others = len(output) - 1 if isinstance(output, tuple) else -1
        return hidden_states if self._others < 0 else (hidden_states, *[None] * self._others)

    @contextmanager
    def in_place_of(self, blocks: nn.ModuleList) -> Iterator[None]:
        """While active, calling a block does not compute it."""
        for block in blocks:
            block.forward = self._forward
        try:
            yield
        finally:
            for block in blocks:
                del block.forward


def _new_batch(
    inputs: torch.Tensor | Mapping[str, torch.Tensor], device: torch.device
) -> tuple[dict[str, torch.Tensor], CalibrationBatch]:
    """What to call the model with, and the batch that will hold its hidden states."""
    model_inputs = dict(inputs) if isinstance(inputs, Mapping) else {"input_ids": inputs}
    # Nothing is learnt from the labels here, so the loss need not be computed.
    model_inputs.pop("labels", None)
    model_inputs = {name: value.to(device) for name, value in model_inputs.items()}
    attention_mask = model_inputs.get("attention_mask")
    return model_inputs, CalibrationBatch(None if attention_mask is None else attention_mask.bool())


@contextmanager
def _record_block_arguments(blocks: nn.ModuleList, batch: CalibrationBatch) -> Iterator[None]:
    """While active, record in `batch` what `blocks` are called with."""
    last_output: torch.Tensor | None = None

    def before_block(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        hidden_states, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        if last_output is None:
            batch.hidden_states = hidden_states
        elif hidden_states is not last_output:
            raise ValueError("The model changes the hidden states between its blocks: cannot go block by block.")
        batch.block_arguments.append((args, kwargs))

    def after_block(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal last_output
        last_output = _first(output)

    with ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(block.register_forward_pre_hook(before_block, with_kwargs=True))
            hooks.enter_context(block.register_forward_hook(after_block))
        yield


@contextmanager
def calibration_mode(model: nn.Module) -> Iterator[None]:
    """While active, the model does without dropout and key-value cache."""
    was_training = {module: module.training for module in model.modules()}
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    model.eval()
    if use_cache is not None:
        config.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        if use_cache is not None:
            config.use_cache = use_cache  # type: ignore[union-attr]
        for module, training in was_training.items():
            module.training = training


def _first(output: Any) -> torch.Tensor:
    # Blocks return their hidden states alone, or first in a tuple.
    return output[0] if isinstance(output, tuple) else output
