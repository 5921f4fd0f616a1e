# SPDX-License-Identifier: Apache-2.0
"""What a model calls its transformer blocks with, so that they can be run again one by one."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Cache


BY_MAGNITUDE = "Only magnitude pruning works for this model."


@dataclass
class CalibrationBatch:
    """A batch of calibration data on its way through the blocks."""

    hidden_states: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # the inputs of the block that is next
    # what each block is called with in addition to the hidden states, positional and by keyword: attention masks,
    # position embeddings and so on
    block_arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def run_block(self, index: int, block: nn.Module) -> torch.Tensor:
        """Run `block`, the one numbered `index`, on the hidden states, and return its output."""
        args, kwargs = self.block_arguments[index]
        return first(block(self.hidden_states, *args, **kwargs))

    def rerun(self, blocks: nn.ModuleList) -> torch.Tensor:
        """The output of all blocks, run one by one; the batch stays where it is."""
        again = CalibrationBatch(self.hidden_states, self.block_arguments)
        for index, block in enumerate(blocks):
            again.hidden_states = again.run_block(index, block)
        return again.hidden_states


class _Entered(Exception):
    """Ends a forward pass where it reaches the first block."""


def entering_states(model: nn.Module, blocks: nn.ModuleList, arguments: dict[str, Any]) -> torch.Tensor:
    """What enters the first block; nothing after that is run."""
    found: list[torch.Tensor] = []

    def stop(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(split_hidden_states(block, args, kwargs)[0])
        raise _Entered

    with blocks[0].register_forward_pre_hook(stop, with_kwargs=True):
        try:
            model(**arguments)
        except _Entered:
            return found[0]
    raise _not_each_once()


@contextmanager
def record_block_calls(blocks: nn.ModuleList, batch: CalibrationBatch) -> Iterator[list[torch.Tensor]]:
    """While active, record in `batch` what `blocks` are called with; yields a list that gets the last output."""
    outputs: list[torch.Tensor] = []

    def before_block(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        index = len(batch.block_arguments)
        if index >= len(blocks) or block is not blocks[index]:
            raise _not_each_once()
        hidden_states, args, kwargs = split_hidden_states(block, args, kwargs)
        if not outputs:
            batch.hidden_states = hidden_states
        elif hidden_states is not outputs[0]:
            raise ValueError(
                "The model changes the hidden states between its blocks, so it cannot be pruned block by block. "
                f"{BY_MAGNITUDE}"
            )
        if any(isinstance(value, Cache) for value in _leaves((args, kwargs))):
            raise ValueError(f"The model passes a cache to block {index} although use_cache is False. {BY_MAGNITUDE}")
        batch.block_arguments.append((args, kwargs))

    def after_block(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs[:] = [first(output)]

    with ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(block.register_forward_pre_hook(before_block, with_kwargs=True))
            hooks.enter_context(block.register_forward_hook(after_block))
        yield outputs
    if len(batch.block_arguments) != len(blocks):
        raise _not_each_once()


@contextmanager
def negated_outputs(blocks: nn.ModuleList) -> Iterator[None]:
    """While active, the blocks return other hidden states than they compute, of a second stream as well (LiLT)."""

    def negate(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, (tuple, list)):
            return -output
        hidden_states, *others = output
        return type(output)([-hidden_states, *(-one if _is_stream(one, hidden_states) else one for one in others)])

    def _is_stream(one: Any, hidden_states: torch.Tensor) -> bool:
        is_states = isinstance(one, torch.Tensor) and one.is_floating_point() and one.ndim == hidden_states.ndim
        return is_states and one.shape[:-1] == hidden_states.shape[:-1]

    with ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(block.register_forward_hook(negate, prepend=True))
        yield


def check_independent(calls: CalibrationBatch, others: CalibrationBatch) -> None:
    """Raise a `ValueError` if what the blocks are called with depends on the hidden states between them."""
    pairs = zip(_arguments_alone(calls), _arguments_alone(others), strict=True)
    for index, (leaves, other_leaves) in enumerate(pairs):
        if len(leaves) != len(other_leaves) or not all(map(_same, leaves, other_leaves)):
            raise ValueError(
                f"Block {index} takes an input that the model computes from the outputs of earlier blocks, so the "
                f"model cannot be pruned block by block. {BY_MAGNITUDE}"
            )


def first(output: Any) -> torch.Tensor:
    """The hidden states that a block returns, alone or first in a tuple or list."""
    return output[0] if isinstance(output, (tuple, list)) else output


def split_hidden_states(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    """The hidden states that a block is called with, and its other arguments."""
    if args:
        return args[0], args[1:], dict(kwargs)
    name = next(name for name in inspect.signature(type(block).forward).parameters if name != "self")
    return kwargs[name], (), {other: value for other, value in kwargs.items() if other != name}


def _arguments_alone(calls: CalibrationBatch) -> list[list[Any]]:
    """What each block is called with, without what all share to write to: it is up to date when a block is run."""
    values = [[*args, *kwargs.values()] for args, kwargs in calls.block_arguments]
    seen = Counter(id(value) for one in values for value in one if isinstance(value, (dict, list)))
    return [list(_leaves([value for value in one if seen[id(value)] < 2])) for one in values]


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for one in value:
            yield from _leaves(one)
    else:
        yield value


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return isinstance(one, torch.Tensor) == isinstance(other, torch.Tensor)


def _not_each_once() -> ValueError:
    return ValueError(
        "The model's forward does not run each of its blocks once and in order, so it cannot be pruned block by "
        f"block. {BY_MAGNITUDE} If it has several stacks of blocks, pass the layers of one that the data runs "
        "through as target_modules."
    )
