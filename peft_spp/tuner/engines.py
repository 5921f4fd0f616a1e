# SPDX-License-Identifier: Apache-2.0
"""Engines that shard or offload parameters: having them whole, and computing inside the modules' own calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from peft.tuners.tuners_utils import onload_layer
from torch import nn

from ..checkpoints.names import WRAPPER_PARTS


if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


# set by DeepSpeed on a parameter inside `deepspeed.zero.GatheredParameters`
_GATHERED_DEPTH = "_ds_z3_gathered_param_context_depth"


@contextmanager
def whole_parameters(layer: nn.Module, write: bool = False) -> Iterator[None]:
    """
    Have the parameters of a layer whole and in memory inside the block: those that DeepSpeed ZeRO-3 or FSDP2 have
    sharded, and those that accelerate has offloaded to the host or to disk. Where parameters are sharded, every
    process has to enter the block. What the caller has gathered already is left to the caller.
    """
    with ExitStack() as stack:
        offloaded = [module for module in layer.modules() if _is_offloaded(module)]
        if offloaded:
            # PEFT's also puts back what was written, but reads more than this layer from disk
            stack.enter_context(onload_layer(layer) if write else _onloaded(offloaded))
        partitioned = [parameter for parameter in layer.parameters() if _is_partitioned(parameter)]
        if partitioned:
            stack.enter_context(_gathered(partitioned, write))
        for module in layer.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if is_dtensor(parameter):
                    stack.enter_context(_replaced_by_whole(module, name, parameter, write))
        yield


def is_dtensor(tensor: torch.Tensor | None) -> TypeGuard[DTensor]:
    """Whether the tensor is a `DTensor`, one that is spread over a mesh of devices."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def is_sharded(tensor: torch.Tensor) -> bool:
    """
    Whether this process holds a part of the tensor, that DeepSpeed ZeRO-3 or FSDP2 has left to it.

    Inside `deepspeed.zero.GatheredParameters` and between FSDP2's `unshard` and `reshard` it holds all of it.
    """
    return _is_partitioned(tensor) or is_dtensor(tensor)


def is_unsharded(tensor: torch.Tensor) -> bool:
    """Whether FSDP2 has put the tensor in place of its shards, and will discard what is written to it."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp import FSDPModule

    states = {module._get_fsdp_state() for module in list(_module_state_mapping) if isinstance(module, FSDPModule)}
    return any(
        tensor is getattr(parameter, "_unsharded_param", None) and not is_dtensor(tensor)
        for state in states
        # older versions of PyTorch have one group in a state
        for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        for parameter in (group.fsdp_params if group is not None else ())
    )


def whole_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape of a tensor when it is whole; DeepSpeed ZeRO-3 leaves an empty one in place of a partitioned one."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process keeps of a tensor, in memory of the tensor's own: of one that is not sharded, all of it."""
    if is_zero3(tensor):
        partition: torch.Tensor = cast(Any, tensor).ds_tensor
        return partition
    with torch.no_grad():  # of a tensor with a gradient it would be a view
        return tensor.to_local() if is_dtensor(tensor) else tensor


def is_tensor_parallel(layer: nn.Module) -> bool:
    """Whether the layer computes with a part of its weight, as Transformers' tensor parallel plans have it."""
    if getattr(layer, "_hf_tp_plan", None) is not None:
        # set on the layer by versions whose local weight is a plain tensor
        return True
    weight = getattr(layer, "weight", None)
    # with FSDP2, whose mesh is called "fsdp" or has no name, a layer computes with its whole weight
    return is_dtensor(weight) and not set(weight.device_mesh.mesh_dim_names or ()) <= {"fsdp"}


def is_zero3(tensor: torch.Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 partitions the tensor, also while it is gathered."""
    return hasattr(tensor, "ds_id")


def _is_partitioned(tensor: torch.Tensor) -> bool:
    if not is_zero3(tensor):
        return False
    parameter = cast(Any, tensor)
    if parameter.ds_status.name != "AVAILABLE":
        return True
    # DeepSpeed leaves small parameters in memory after a forward pass. Nobody gathered them, so nobody puts back what
    # is written to them.
    return bool(parameter.ds_persist) and not getattr(parameter, _GATHERED_DEPTH, 0)


def _is_offloaded(module: nn.Module) -> bool:
    hook = getattr(module, "_hf_hook", None)
    return getattr(hook, "offload", False) and any(p.is_meta for p in module.parameters(recurse=False))


@contextmanager
def _onloaded(modules: Sequence[nn.Module]) -> Iterator[None]:
    for module in modules:
        cast(Any, module)._hf_hook.pre_forward(module)
    try:
        yield
    finally:
        for module in modules:
            cast(Any, module)._hf_hook.post_forward(module, torch.tensor([]))


@contextmanager
def _gathered(parameters: Sequence[nn.Parameter], write: bool) -> Iterator[None]:
    # it is there, since it has partitioned these parameters
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if write else None):
        yield


@contextmanager
def _replaced_by_whole(module: nn.Module, name: str, parameter: DTensor, write: bool) -> Iterator[None]:
    from torch.distributed.tensor import distribute_tensor

    whole = nn.Parameter(parameter.full_tensor().detach(), requires_grad=parameter.requires_grad)
    module._parameters[name] = whole
    try:
        yield
        if write:
            with torch.no_grad():
                parameter.copy_(distribute_tensor(whole.detach(), parameter.device_mesh, parameter.placements))
    finally:
        module._parameters[name] = parameter  # type: ignore[assignment]


# the name of the module that FSDP1's wrapper holds; its class cannot be imported where torch is built without it
_FSDP_WRAPPED = "_fsdp_wrapped_module"
_lock = threading.Lock()


class _OfThread(threading.local):
    """What stands for forward passes in the calls that a thread is in, the innermost last."""

    def __init__(self) -> None:
        self.forwards: list[tuple[nn.Module, Callable[..., Any]]] = []


_of_thread = _OfThread()


class _Dispatch:
    """The forward pass of a module while threads replace it, each for itself."""

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
