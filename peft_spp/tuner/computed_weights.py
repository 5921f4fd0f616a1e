# SPDX-License-Identifier: Apache-2.0
"""Weights that are no parameters, because something computes them: what is written to them does not stay."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


_UTILITIES = "torch.nn.utils"


def check_writable(module: nn.Module, name: str, module_name: str) -> None:
    """
    Check that a weight is a parameter, which an adapter can be merged into and taken out of again.

    Args:
        module (`nn.Module`): The module that has the weight.
        name (`str`): The name of the weight in it.
        module_name (`str`): The name of the module, or of the parameter, for the message.

    Raises:
        ValueError: If something computes the weight. The message says what, and how to make it a parameter.
    """
    found = _computed_by(module, name)
    if found is not None:
        what, remedy = found
        raise ValueError(
            f"Cannot merge into {module_name!r} or unmerge it: {what} computes its {name}, and would overwrite what "
            f"is written there. {remedy}"
        )


def _computed_by(module: nn.Module, name: str) -> tuple[str, str] | None:
    if parametrize.is_parametrized(module, name):
        call = f"remove_parametrizations(module, {name!r})"
        return f"`{_UTILITIES}.parametrize`", f"Call `{_UTILITIES}.parametrize.{call}` on it first."
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == name:
            return f"`{_UTILITIES}.prune`", f"Call `{_UTILITIES}.prune.remove(module, {name!r})` on it first."
        for kind in (WeightNorm, SpectralNorm):
            if isinstance(hook, kind) and hook.name == name:
                util = "weight_norm" if kind is WeightNorm else "spectral_norm"
                return f"`{_UTILITIES}.{util}`", f"Call `{_UTILITIES}.remove_{util}(module, {name!r})` on it first."
    weight = getattr(module, name, None)
    if not isinstance(weight, torch.Tensor) or isinstance(weight, nn.Parameter) or name in module._buffers:
        return None
    if getattr(module, "_is_replica", False):
        return (
            "`torch.nn.DataParallel`, which has copied it for a forward pass,",
            "Call `unmerge_adapter` on the model before its forward pass.",
        )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return (
            "FSDP1, which has gathered it for a forward pass,",
            "Call this before the forward pass, inside `FullyShardedDataParallel.summon_full_params(model)`.",
        )
    return f"the class {type(module).__name__}", "Make it a parameter of the module first."
