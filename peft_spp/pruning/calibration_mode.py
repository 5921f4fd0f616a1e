# SPDX-License-Identifier: Apache-2.0
"""A model while it is calibrated: no dropout, no cache, and no random numbers lost to checks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig


_EXPERTS = "_experts_implementation_internal"


@contextmanager
def calibration_mode(model: nn.Module) -> Iterator[None]:
    """
    While active, the model is in eval mode, keeps no cache, and runs experts one by one; afterward, its state is
    restored.
    """
    was_training = {module: module.training for module in model.modules()}
    configs = _configs(model)
    use_cache = [(config, config.use_cache) for config in configs if hasattr(config, "use_cache")]
    # past the property, which would set those of nested configurations as well
    experts = [(config, vars(config)[_EXPERTS]) for config in configs if _EXPERTS in vars(config)]
    model.eval()
    for config, _ in use_cache:
        config.use_cache = False
    for config, _ in experts:
        vars(config)[_EXPERTS] = "eager"
    try:
        yield
    finally:
        for config, value in use_cache:
            config.use_cache = value
        for config, value in experts:
            vars(config)[_EXPERTS] = value
        for module, training in was_training.items():
            module.training = training


@contextmanager
def draws_restored(device: torch.device) -> Iterator[None]:
    """
    While active, random numbers may be drawn on the CPU and on `device`; afterward, their generators are restored.

    Models such as ViTMAE draw patches in each forward pass. With the checks inside this, they draw the same numbers
    for the calibration data as in plain passes over it.
    """
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type):
        yield


def accepts(module: nn.Module, argument: str) -> bool:
    """Whether the forward of `module` names an argument."""
    return argument in inspect.signature(module.forward).parameters


def _configs(model: nn.Module) -> list[Any]:
    """The configurations of a model and its parts: a multimodal model nests that of its text model."""
    found: dict[int, Any] = {}
    waiting = [config for module in model.modules() if (config := getattr(module, "config", None)) is not None]
    while waiting:
        config = waiting.pop()
        if id(config) not in found:
            found[id(config)] = config
            waiting += [value for value in getattr(config, "__dict__", {}).values() if _is_config(value)]
    return list(found.values())


def _is_config(value: object) -> bool:
    return isinstance(value, PreTrainedConfig)
