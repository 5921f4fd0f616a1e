# SPDX-License-Identifier: Apache-2.0
"""Parameter groups for optimizers, with a separate learning rate for the factor B."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

from peft.optimizers import loraplus
from torch import nn

from .tuner import SPPLayer


def warn_in_loraplus() -> None:
    """
    Make `peft.optimizers.create_loraplus_optimizer` warn of a model with SPP adapters. Calling it again is a no-op.

    Programs may have imported the function before this package, so what is wrapped is what it calls with the model.
    """
    names = loraplus.get_parameter_names
    if not hasattr(names, "warns_of_spp"):
        loraplus.get_parameter_names = _warning(names)


def _warning(get_parameter_names: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(get_parameter_names)
    def names_of(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(layer, SPPLayer) for layer in model.modules()):
            warnings.warn(
                "create_loraplus_optimizer looks for the names of LoRA's factors, so `loraplus_lr_ratio` has no "
                "effect on SPP: A and B get the same learning rate. Use "
                "`peft_spp.spp_parameter_groups(model, lr, B_lr_ratio=...)`.",
                stacklevel=3,
            )
        return get_parameter_names(model, *args, **kwargs)

    setattr(names_of, "warns_of_spp", True)  # noqa: B010  (for mypy)
    return names_of


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
    factors: dict[str, set[int]] = {"spp_A": set(), "spp_B": set()}
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
