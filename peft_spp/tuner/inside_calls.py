# SPDX-License-Identifier: Apache-2.0
"""Computing with the parameters of several modules at once, inside the modules' own calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import nn

from ..sparsity.names import WRAPPER_PARTS


# the name of the module that FSDP1's wrapper holds; its class cannot be imported where torch is built without it
_FSDP_WRAPPED = "_fsdp_wrapped_module"
_lock = threading.Lock()


class _OfThread(threading.local):
    """What stands for forward passes in the calls that a thread is in, the innermost last."""

    def __init__(self) -> None:
        self.forwards: list[tuple[nn.Module, Callable[..., Any]]] = []


_of_thread = _OfThread()


class _Dispatch:
    """
    The forward pass of a module while threads replace it, each for itself.

    Args:
        module (`nn.Module`): The module.
        own (`Callable`, *optional*): The forward pass that was set on the instance.
    """

    def __init__(self, module: nn.Module, own: Callable[..., Any] | None) -> None:
        self.module = module
        self.own = own
        self.users = 0

    @property
    def original(self) -> Callable[..., Any]:
        """The forward pass of a thread that has not replaced it."""
        forward: Callable[..., Any] = type(self.module).forward.__get__(self.module) if self.own is None else self.own
        return forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for module, forward in reversed(_of_thread.forwards):
            if module is self.module:
                return forward(*args, **kwargs)
        return self.original(*args, **kwargs)


def is_hooked(module: nn.Module) -> bool:
    """
    Whether calling a module does more than run its class's forward pass.

    Engines that shard or offload parameters bring them into memory around the call of the module that owns them: with
    hooks (DeepSpeed, FSDP2), with a forward pass set on the instance (accelerate), or as a module around it (FSDP1).
    """
    forward = module.__dict__.get("forward")
    return (
        (forward is not None and not (isinstance(forward, _Dispatch) and forward.own is None))
        or _FSDP_WRAPPED in module._modules
        or bool(module._forward_hooks or module._forward_pre_hooks)
        or bool(module._backward_hooks or module._backward_pre_hooks)
    )


def own_forward(module: nn.Module) -> Callable[..., torch.Tensor]:
    """What a call of the module runs when all that surrounds it has been done."""
    module, slot = _forward_slot(module)
    forward: Callable[..., torch.Tensor] = getattr(module, slot)
    return forward.original if isinstance(forward, _Dispatch) else forward


def innermost(module: nn.Module) -> nn.Module:
    """The module itself, without those that only wrap it."""
    while part := next((name for name in module._modules if name in WRAPPER_PARTS), None):
        module = cast(nn.Module, module._modules[part])
    return module


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
def forward_within(module: nn.Module, context: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """
    While this context is open, the module's own forward pass runs in another one, which its hooks are outside of.

    Args:
        module (`nn.Module`): The module, perhaps with others around it.
        context (`Callable[[], AbstractContextManager]`): Makes the context of a forward pass.
    """
    inner, _ = _forward_slot(module)
    below = next((forward for owner, forward in reversed(_of_thread.forwards) if owner is inner), None)
    below = below or own_forward(inner)

    def forward(*args: Any, **kwargs: Any) -> Any:
        with context():
            return below(*args, **kwargs)

    with _forward_replaced(module, forward):
        yield


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    module, slot = _forward_slot(module)
    if torch.compiler.is_compiling():
        with _traced(module, slot, forward):
            yield
        return
    with _lock:
        dispatch = module.__dict__.get(slot)
        if not isinstance(dispatch, _Dispatch) or dispatch.module is not module:
            dispatch = module.__dict__[slot] = _Dispatch(module, dispatch)
        dispatch.users += 1
    _of_thread.forwards.append((module, forward))
    try:
        yield
    finally:
        _of_thread.forwards.pop()
        with _lock:
            dispatch.users -= 1
            if not dispatch.users:
                _set_or_delete(module, slot, dispatch.own)


@contextmanager
def _traced(module: nn.Module, slot: str, forward: Callable[..., Any]) -> Iterator[None]:
    """The same in what the compiler can follow; nothing of it is left in the compiled code."""
    own = module.__dict__.get(slot)
    module.__dict__[slot] = forward
    try:
        yield
    finally:
        _set_or_delete(module, slot, own)


def _set_or_delete(module: nn.Module, slot: str, forward: Callable[..., Any] | None) -> None:
    if forward is None:
        del module.__dict__[slot]
    else:
        module.__dict__[slot] = forward


def _forward_slot(module: nn.Module) -> tuple[nn.Module, str]:
    """The module, and its attribute, that hold the forward pass which all else is around."""
    # not inside other wrappers: what they call again, in a backward pass or compiled, would not be replaced then
    while _FSDP_WRAPPED in module._modules:
        module = module.get_submodule(_FSDP_WRAPPED)
    # accelerate sets a forward pass of its own on the instance, which calls the one that it has put aside
    return module, "_old_forward" if hasattr(module, "_hf_hook") else "forward"
