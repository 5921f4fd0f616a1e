# SPDX-License-Identifier: Apache-2.0
"""Which layers and parameters can be adapted."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .quantized import Backend, is_foreign
from .targets import fused_experts, why_not_adaptable
from .whole_parameters import is_tensor_parallel, whole_shape


def check_layer(layer: nn.Module, module_name: str, backend: Backend | None) -> None:
    """
    Check that a layer is a linear one whose weight is a plain floating-point matrix, or quantized.

    Args:
        layer (`nn.Module`): The layer that an adapter targets.
        module_name (`str`): Its name, for the message.
        backend ([`Backend`], *optional*): How to read its weight, if that is quantized.

    Raises:
        ValueError: If it is another layer.
    """
    if is_tensor_parallel(layer):
        raise ValueError(
            f"Target module {module_name!r} ({type(layer).__name__}) is split by tensor parallelism, which SPP does "
            "not support. Load the base model without a `tp_plan`, and shard it with FSDP or DeepSpeed ZeRO-3 if it "
            "is too large; or leave the module out of `target_modules`."
        )
    if backend is not None:
        try:
            backend.check(layer)
        except ValueError as error:
            raise ValueError(f"Target module {module_name!r} is not supported: {error}.") from error
        return
    if not isinstance(layer, (nn.Linear, Conv1D)):
        raise ValueError(
            f"Target module {module_name!r} ({layer}) is not supported. Currently, only the following modules are "
            "supported: `torch.nn.Linear`, `transformers.pytorch_utils.Conv1D`, and the quantized linear layers of "
            "bitsandbytes, torchao, HQQ and others. For the layers of another quantization package see "
            "`peft_spp.tuner.quantized.register_backend`."
        )
    kind = f"{type(layer).__module__}.{type(layer).__name__}"
    if reason := why_not_adaptable(layer):
        raise ValueError(
            f"Target module {module_name!r} ({kind}) is not supported: it does not compute `x @ weight.T + bias`, "
            f"{reason}. Leave it out of `target_modules`, or name it in `exclude_modules`."
        )
    check_weight(getattr(layer, "weight", None), f"Target module {module_name!r} ({kind})")


def warn_of_other_maps(others: Mapping[str, str]) -> None:
    """
    Warn of layers that are linear by their class, and left out because they compute something else.

    Args:
        others (`Mapping[str, str]`): Their names, and what [`other_maps`] gives as reasons.
    """
    if not others:
        return
    shown = "; ".join(f"{name}: {reason}" for name, reason in list(others.items())[:3])
    warnings.warn(
        f"{len(others)} layers are linear by their class, but do not compute `x @ weight.T + bias`, and are not "
        f"adapted: {shown}.",
        stacklevel=2,
    )


def check_not_saved_whole(module_name: str, modules_to_save: Sequence[str] | None) -> None:
    """
    Check that a target is not in a module that `modules_to_save` names as well.

    PEFT leaves targets out that are named there, but wraps any module whose name has that end: `"proj"` is also
    `q_proj`.

    Args:
        module_name (`str`): The name of the target.
        modules_to_save (`Sequence[str]`, *optional*): The setting.

    Raises:
        ValueError: If it is.
    """
    parts = module_name.split(".")
    for at in range(len(parts)):
        name = ".".join(parts[: at + 1])
        end = next((one for one in modules_to_save or () if name.endswith(one)), None)
        if end is not None:
            where = "is" if name == module_name else f"is in {name!r}, which is"
            raise ValueError(
                f"Target module {module_name!r} {where} also trained and saved as a whole, because its name ends with "
                f"{end!r} of `modules_to_save`. Write the name there in full, or leave the target out with "
                "`exclude_modules`."
            )


def check_weight(weight: torch.Tensor | None, name: str, dimensions: tuple[int, ...] = (2,)) -> None:
    """
    Check that a weight is a plain floating-point matrix, or a stack of them where that may be.

    Args:
        weight (`torch.Tensor`, *optional*): The weight.
        name (`str`): What it is called, for the message.
        dimensions (`tuple[int, ...]`): The numbers of dimensions that it may have.

    Raises:
        ValueError: If it is anything else.
    """
    shape = () if weight is None else whole_shape(weight)
    supported = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    if weight is None or weight.dtype not in supported or len(shape) not in dimensions or is_foreign(weight):
        found = "no weight" if weight is None else f"a weight of dtype {weight.dtype} and shape {shape}"
        if weight is not None and is_foreign(weight):
            found = f"a weight of type {type(weight).__module__}.{type(weight).__name__}"
        wanted = "two-dimensional weights" if dimensions == (2,) else "weights of two dimensions, and stacks of them,"
        raise ValueError(
            f"{name} has {found}. SPP adapts {wanted} in float64, float32, bfloat16 or float16: load the base model "
            "in one of these, leave it out of the targets, or, for a quantization that is not supported, tell how its "
            "weights are read with `peft_spp.tuner.quantized.register_backend`."
        )


def warn_of_fused_experts(model: nn.Module) -> None:
    """Warn of the experts that the default targets leave out. See [`fused_experts`]."""
    experts = fused_experts(model)
    if not experts:
        return
    kinds = sorted({re.sub(r"^.*?\.\d+\.", "", name) for name in experts})
    warnings.warn(
        f"The default targets are linear layers. The model has {len(experts)} parameters that hold the weights of "
        f"experts, which are not adapted: {', '.join(kinds)}. Pass `target_parameters={kinds}` to adapt them too, or "
        "`target_parameters=[]` if this is intended.",
        stacklevel=2,
    )
