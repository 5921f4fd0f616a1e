# SPDX-License-Identifier: Apache-2.0
"""Parameter groups for optimizers, with a separate learning rate for the factor B."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

from peft.optimizers import loraplus
from peft.optimizers.lorafa import LoraFAOptimizer
from torch import nn

from .tuner import SPPLayer


_FACTORS = ("spp_A", "spp_B")


def warn_in_optimizers() -> None:
    """
    Make PEFT's `create_loraplus_optimizer` and `create_lorafa_optimizer` warn of a model with SPP adapters, for which
    they have no special rule. Calling it again is a no-op.

    Programs may have imported the functions before this package, so what is wrapped is what they call.
    """
    names = loraplus.get_parameter_names
    if not hasattr(names, "warns_of_spp"):
        loraplus.get_parameter_names = _warning(
            names,
            lambda model, *args, **kwargs: any(isinstance(layer, SPPLayer) for layer in model.modules()),
            "create_loraplus_optimizer looks for the names of LoRA's factors, so `loraplus_lr_ratio` has no effect on "
            "SPP: A and B get the same learning rate. Use `peft_spp.spp_parameter_groups(model, lr, B_lr_ratio=...)`.",
        )
    init = LoraFAOptimizer.__init__
    if not hasattr(init, "warns_of_spp"):
        setattr(LoraFAOptimizer, "__init__", _warning(init, _has_factors, _LORA_FA))  # noqa: B010  (for mypy)


_LORA_FA = (
    "create_lorafa_optimizer looks for the names of LoRA's factors, so it does not freeze A of SPP, and scales no "
    "gradient: it is AdamW here. Use `torch.optim.AdamW`."
)


def _has_factors(optimizer: LoraFAOptimizer, params: Any, *args: Any, **kwargs: Any) -> bool:
    groups = [group for group in params if isinstance(group, dict)] if isinstance(params, (list, tuple)) else []
    names = [name for group in groups for name in group.get("names", ())]
    return any(f".{factor}." in name for name in names for factor in _FACTORS)


def _warning(function: Callable[..., Any], is_spp: Callable[..., bool], message: str) -> Callable[..., Any]:
    @wraps(function)
    def warns(*args: Any, **kwargs: Any) -> Any:
        if is_spp(*args, **kwargs):
            warnings.warn(message, stacklevel=3)
        return function(*args, **kwargs)

    setattr(warns, "warns_of_spp", True)  # noqa: B010  (for mypy)
    return warns


def spp_parameter_groups(
    model: nn.Module, lr: float, *, B_lr_ratio: float = 1.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """
    The trained parameters of a model in groups for an optimizer, as LoRA+ has them for LoRA.

    `peft.optimizers.create_loraplus_optimizer` looks for LoRA's names, so that with SPP all factors get the learning
    rate of A there. LoRA+ is described in https://huggingface.co/papers/2402.12354.

    Args:
        model (`nn.Module`): A model with SPP adapters. Group before FSDP1 or DeepSpeed wraps it.
        lr (`float`): The learning rate of A, and of what is trained besides the factors.
        B_lr_ratio (`float`, *optional*, defaults to 1.0): The learning rate of B over `lr`.
        weight_decay (`float`, *optional*, defaults to 0.0): For all but biases and other one-dimensional parameters.

    Returns:
        `list[dict]`: The groups, with the keys `"params"`, `"lr"` and `"weight_decay"`. Empty ones are left out.

    Raises:
        ValueError: If no SPP factor of the model is trained, or `B_lr_ratio` is not a positive number.

    Example:

    ```py
    >>> groups = spp_parameter_groups(model, lr=1e-2, B_lr_ratio=4.0)
    >>> trainer = SFTTrainer(model, train_dataset=data, optimizers=(torch.optim.AdamW(groups), None))
    ```
    """
    if not 0.0 < B_lr_ratio < math.inf:
        raise ValueError(f"B_lr_ratio={B_lr_ratio!r} is not a positive number")
    factors: dict[str, set[int]] = {name: set() for name in _FACTORS}
    for layer in model.modules():
        if isinstance(layer, SPPLayer):
            for name, found in factors.items():
                found.update(id(one) for one in getattr(layer, name).parameters() if one.requires_grad)
    if not factors["spp_B"]:
        raise ValueError(
            "the model has no SPP factors that are trained: add an adapter with `get_peft_model`, or set "
            "`is_trainable=True` where one is loaded"
        )
    # of A and the rest, of B, and of what does not decay
    groups: list[dict[str, Any]] = [
        {"params": [], "lr": lr, "weight_decay": weight_decay},
        {"params": [], "lr": lr * B_lr_ratio, "weight_decay": weight_decay},
        {"params": [], "lr": lr, "weight_decay": 0.0},
    ]
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_b, is_a = id(parameter) in factors["spp_B"], id(parameter) in factors["spp_A"]
            groups[1 if is_b else 0 if is_a or parameter.ndim > 1 else 2]["params"].append(parameter)
    return [group for group in groups if group["params"]]
