# SPDX-License-Identifier: Apache-2.0
"""Batches in which every sample has an adapter of its own: the names on their way to the layers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .layer import SPPLayer


@contextmanager
def passed_to_layers(tuner: nn.Module, model: nn.Module, adapter_names: Any, num_beams: Any) -> Iterator[None]:
    """
    While the context is open, every layer is called with the adapter names of its inputs.

    Args:
        tuner (`nn.Module`): The model with the adapters, that holds all layers.
        model (`nn.Module`): The model that was adapted, which knows its encoder.
        adapter_names (`list[str]`): The adapter of each sample; `"__base__"` for none.
        num_beams (`int`, *optional*): The number of beams of a beam search.

    Raises:
        ValueError: If no layer has one of the adapters.
        TypeError: If the names are no list, and there are beams.
    """
    # Check that users only passed actually existing adapters. Not every layer has every adapter, but a name that no
    # layer knows is a typo.
    expected = {name for module in tuner.modules() if isinstance(module, SPPLayer) for name in module.spp_A}
    unexpected = set(adapter_names) - {"__base__"} - expected
    if unexpected:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unexpected))}")

    beams = num_beams if isinstance(num_beams, int) and num_beams > 1 else 1
    if beams > 1 and not isinstance(adapter_names, (list, tuple)):
        raise TypeError(f"Got adapter names of type {type(adapter_names)}, expected a list of str.")
    layers = [module for module in tuner.modules() if isinstance(module, SPPLayer)]
    thread = threading.get_ident()
    handles = [
        module.register_forward_pre_hook(
            partial(_pass_adapter_names, adapter_names=names, thread=thread), with_kwargs=True
        )
        for module, names in _names_by_module(tuner, model, adapter_names, beams)
    ]
    try:
        for layer in layers:
            layer.mixed_batch_threads |= {thread}
        yield
    finally:
        for layer in layers:
            layer.mixed_batch_threads -= {thread}
        for handle in handles:
            handle.remove()


def _names_by_module(
    tuner: nn.Module, model: nn.Module, adapter_names: Sequence[str], beams: int
) -> Iterator[tuple[nn.Module, list[str]]]:
    # With beam search each input is repeated once a beam, and so is its adapter name. The encoder of an
    # encoder-decoder model still sees every input once.
    encoder = _get_encoder(model) if beams > 1 else None
    in_encoder = set(encoder.modules()) if encoder is not None else set()
    for module in tuner.modules():
        if isinstance(module, (SPPLayer, AuxiliaryTrainingWrapper)):
            repeats = 1 if module in in_encoder else beams
            yield module, [name for name in adapter_names for _ in range(repeats)]


def _pass_adapter_names(
    module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: list[str], thread: int
) -> Any:
    if threading.get_ident() == thread:  # the hook is there for batches of other threads, too
        kwargs["adapter_names"] = adapter_names
    return args, kwargs


def _get_encoder(model: nn.Module) -> nn.Module | None:
    """The encoder of an encoder-decoder model; Transformers 5 returns the model itself where there is none."""
    get_encoder: Callable[[], nn.Module] | None = getattr(model, "get_encoder", None)
    encoder = get_encoder() if get_encoder is not None else None
    return None if encoder is model else encoder
