# SPDX-License-Identifier: Apache-2.0
"""Parameters that an engine has sharded or put aside, brought into memory as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from peft.tuners.tuners_utils import onload_layer
from torch import nn


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

    Args:
        layer (`nn.Module`): The tuner layer; nothing is done for what it has in memory.
        write (`bool`): Whether what is written to the parameters inside the block is to stay.
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
