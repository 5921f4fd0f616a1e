# SPDX-License-Identifier: Apache-2.0
"""A call that is refused leaves the model unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn


def snapshot(model: nn.Module) -> tuple[list[tuple[Any, ...]], dict[str, tuple[Any, ...]]]:
    """All that a failed call must not change: modules, hooks of Accelerate, settings, and parameters."""
    configs = getattr(model, "peft_config", {})
    state = [
        *(
            (name, id(module), type(module), type(getattr(module, "_hf_hook", None)))
            for name, module in model.named_modules()
        ),
        *((name, vars(config).copy()) for name, config in configs.items()),
        *((key,) for key in sorted(vars(model)) if not key.startswith("_")),
    ]
    parameters = {
        name: (id(p), p.data_ptr(), p.requires_grad, p if p.is_meta else p.detach().clone())
        for name, p in model.named_parameters()
    }
    return state, parameters


def assert_unchanged(model: nn.Module, before: tuple[list[tuple[Any, ...]], dict[str, tuple[Any, ...]]]) -> None:
    state, parameters = snapshot(model)
    assert state == before[0] and parameters.keys() == before[1].keys()
    for name, (*rest, tensor) in parameters.items():
        *rest_before, tensor_before = before[1][name]
        assert rest == rest_before and (tensor.is_meta or torch.equal(tensor, tensor_before)), name


@contextmanager
def refused(
    model: nn.Module, match: str | None = None, kind: type[Exception] | tuple[type[Exception], ...] = ValueError
) -> Iterator[pytest.ExceptionInfo]:
    """Inside, an error is raised, and the model stays unchanged."""
    before = snapshot(model)
    with pytest.raises(kind, match=match) as error:
        yield error
    assert_unchanged(model, before)
