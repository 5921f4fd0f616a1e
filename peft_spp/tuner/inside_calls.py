# SPDX-License-Identifier: Apache-2.0
"""Computing with the parameters of several modules at once, inside the modules' own calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


# the name of the module that FSDP1's wrapper holds; its class cannot be imported where torch is built without it
_FSDP_WRAPPED = "_fsdp_wrapped_module"


def is_hooked(module: nn.Module) -> bool:
    """
    Whether calling a module does more than run its class's forward pass.

    Engines that shard or offload parameters bring them into memory around the call of the module that owns them: with
    hooks (DeepSpeed, FSDP2), with a forward pass set on the instance (accelerate), or as a module around it (FSDP1).
    """
    return (
        "forward" in module.__dict__
        or _FSDP_WRAPPED in module._modules
        or bool(module._forward_hooks or module._forward_pre_hooks)
        or bool(module._backward_hooks or module._backward_pre_hooks)
    )


def own_forward(module: nn.Module) -> Callable[..., torch.Tensor]:
    """What a call of the module runs when all that surrounds it has been done."""
    module, slot = _forward_slot(module)
    forward: Callable[..., torch.Tensor] = getattr(module, slot)
    return forward


def call_inside(modules: Sequence[nn.Module], compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """
    `compute(*args, **kwargs)`, run in place of the forward passes of some modules, each inside the call of the one
    before it. All their parameters are in memory then, and what acts on a module's inputs, outputs and gradients acts
    on those of `compute`.

    Args:
        modules (`Sequence[nn.Module]`): The modules whose parameters `compute` reads, outermost first.
        compute (`Callable`): What to run.
        args, kwargs: Its arguments; the modules' hooks see them too.

    Returns:
        `Any`: The result, as the hooks of the modules leave it.
    """
    if not modules:
        return compute(*args, **kwargs)
    inner = modules[1:]

    def forward(*args: Any, **kwargs: Any) -> Any:
        return call_inside(inner, compute, *args, **kwargs)

    with _forward_replaced(modules[0], forward):
        return modules[0](*args, **kwargs)


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    module, slot = _forward_slot(module)
    own = module.__dict__.get(slot)
    module.__dict__[slot] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__[slot]
        else:
            module.__dict__[slot] = own


def _forward_slot(module: nn.Module) -> tuple[nn.Module, str]:
    """The module, and its attribute, that hold the forward pass which all else is around."""
    while _FSDP_WRAPPED in module._modules:
        module = module.get_submodule(_FSDP_WRAPPED)
    # accelerate sets a forward pass of its own on the instance, which calls the one that it has put aside
    return module, "_old_forward" if hasattr(module, "_hf_hook") else "forward"
