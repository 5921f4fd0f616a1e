# SPDX-License-Identifier: Apache-2.0
"""
What a model is made of: its transformer blocks, the linear layers in them, the routers among these, and its positions.

The tuner, the pruner and, as far as names go, the reports ask here, so that what one leaves alone the others do too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias, TypeGuard, cast

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from transformers.pytorch_utils import Conv1D

from .checkpoints.layout import has_transposed_experts, says_transposed
from .checkpoints.names import is_fused_experts, plain_name, special_role


LinearLayer: TypeAlias = nn.Linear | Conv1D
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The dtypes of weights that are not quantized."""

_UTILITIES = "torch.nn.utils"


def is_linear_layer(module: nn.Module) -> TypeGuard[LinearLayer]:
    """Whether the module is a linear layer by its class. What it computes, [`why_not_linear_map`] tells."""
    return isinstance(module, (nn.Linear, Conv1D))


def is_router(name: str) -> bool:
    """Whether a module chooses the experts of a mixture, or weighs them, or is a part of one that does."""
    return special_role(plain_name(name)) == "router"


def find_block_lists(
    modules: Mapping[str, nn.Module], is_linear: Callable[[nn.Module], bool] = is_linear_layer
) -> dict[str, nn.ModuleList]:
    """
    Find the transformer blocks of a model: the elements of its outermost `nn.ModuleList`s with linear layers inside.

    They are `layers` of a Llama, `h` of a GPT-2, `encoder.block` and `decoder.block` of a T5. A list of bare linear
    layers is a set of heads.
    """
    found: dict[str, nn.ModuleList] = {}
    for name, module in modules.items():
        inside_another = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and not inside_another and _holds_blocks(module, is_linear):
            found[name] = module
    return found


def linear_layers_in_blocks(
    modules: Mapping[str, nn.Module], is_linear: Callable[[nn.Module], bool] = is_linear_layer
) -> dict[str, str]:
    """Find the linear layers of the transformer blocks, without the routers."""
    layers: dict[str, str] = {}
    for block_list in find_block_lists(modules, is_linear):
        for name, module in modules.items():
            if name.startswith(f"{block_list}.") and is_linear(module) and not is_router(name):
                layers[name] = block_list
    return layers


def context_length(model: nn.Module) -> int | None:
    """How many tokens a model can take, `None` if nothing limits them."""
    table = position_table(model)
    return _declared_context(model) if table is None else table[1]


def position_table(model: nn.Module) -> tuple[str, int] | None:
    """The embedding of learned positions and how many tokens it allows, `None` if positions are computed."""
    limit = _declared_context(model)
    if limit is None:
        return None
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or re.search(r"pos|wpe", name.rpartition(".")[2]) is None:
            continue
        if module.num_embeddings == limit and module.padding_idx is not None:
            # RoBERTa and models like it count positions from the one after that of padding
            return name, limit - module.padding_idx - 1
        # OPT's has two rows more than positions
        if 0 <= module.num_embeddings - limit <= 2:
            return name, limit
    return None


def _declared_context(model: nn.Module) -> int | None:
    config = cast(Any, model).config.get_text_config()
    # MPT has another name for it, and XLNet, which has no limit, -1
    limits = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


def find_expert_stacks(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """
    Find the parameters that hold the weights of all experts of a mixture, which are not linear layers.

    For each it gives the module that has it, and its name there.
    """
    found: dict[int, tuple[str, nn.Module, str]] = {}
    for name, module in model.named_modules():
        for own_name, parameter in module.named_parameters(prefix=name, recurse=False):
            plain = plain_name(own_name).removesuffix(".weight")
            if parameter.ndim == 3 and is_fused_experts(plain):
                found.setdefault(id(parameter), (own_name, module, own_name.rpartition(".")[2]))
    return {name: (module, parameter) for name, module, parameter in found.values()}


def is_stored_transposed(module: nn.Module, dims: int, model_types: Collection[str]) -> bool:
    """
    Whether a module stores a weight of so many dimensions as (in_features, out_features), by what
    [`~peft_spp.sparsity.sparsity_report`] goes by.
    """
    if dims != 3:
        return isinstance(module, Conv1D)
    said = says_transposed(module)
    return has_transposed_experts(model_types) if said is None else said


def has_plain_forward(layer: LinearLayer) -> bool:
    """Whether a layer has the forward pass and the call of `nn.Linear` or `Conv1D`, and not those of a subclass."""
    function = getattr(_own_forward(layer), "__func__", None)
    return function in (nn.Linear.forward, Conv1D.forward) and not _has_own_call(layer)


def _own_forward(layer: LinearLayer) -> Callable[..., Any]:
    """The forward pass of a layer, which may have been set on it alone; accelerate's hooks keep the one that was."""
    forward: Callable[..., Any] = layer._old_forward if hasattr(layer, "_hf_hook") else layer.forward  # type: ignore
    return forward


def _has_own_call(layer: LinearLayer) -> bool:
    return type(layer).__call__ is not nn.Module.__call__


@torch.no_grad()
def why_not_linear_map(layer: LinearLayer) -> str | None:
    """
    Tell why a layer does not compute `x W^T + b`, as its class promises.

    Only a layer with its own forward pass has to be asked: by calling it with two inputs of different size. On the
    meta device only the shape of the result can be compared.
    """
    base = cast(Any, Conv1D if isinstance(layer, Conv1D) else nn.Linear)
    weight = getattr(layer, "weight", None)  # compressed-tensors has it packed under another name
    if weight is None or has_plain_forward(layer) or weight.dtype not in FLOATING or weight.ndim != 2:
        return None
    if _has_own_call(layer):
        return "its class overrides `__call__`"
    inputs = weight.shape[0] if isinstance(layer, Conv1D) else weight.shape[1]
    # no random numbers, which would change those of the run that asks
    x = torch.arange(2 * inputs, device=weight.device, dtype=torch.float32).cos().reshape(2, inputs)
    x = (x * torch.tensor([[1.0], [30.0]], device=weight.device)).to(weight.dtype)
    expected = base.forward(layer, x)
    try:
        actual = _own_forward(layer)(x)
    except Exception as error:  # whatever it raises is the answer
        return f"a call with a matrix raises {type(error).__name__} ({error})"
    if not isinstance(actual, torch.Tensor):
        return f"it returns a {type(actual).__name__}"
    if actual.shape != expected.shape:
        return f"its output has shape {tuple(actual.shape)}, and `x @ weight.T` has {tuple(expected.shape)}"
    if weight.is_meta:
        return None
    off = (actual.double() - expected.double()).norm(dim=1)
    tolerance = max(1e-4, 4 * torch.finfo(weight.dtype).eps)
    if not bool((off <= tolerance * expected.double().norm(dim=1)).all()):
        return "its output is not `x @ weight.T + bias`"
    return None


def what_computes(module: nn.Module, name: str) -> tuple[str, str] | None:
    """
    Tell what computes a weight that is not a parameter, so that what is written to it does not stay, and how to make
    it a parameter. `None` if nothing does.
    """
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


def _holds_blocks(module: nn.ModuleList, is_linear: Callable[[nn.Module], bool]) -> bool:
    present = [block for block in module if block is not None]  # Informer has a list with a place left empty
    return not any(is_linear(block) for block in present) and any(
        is_linear(layer) for block in present for layer in block.modules()
    )
