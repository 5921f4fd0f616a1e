# SPDX-License-Identifier: Apache-2.0
"""Weights that several modules share, before a merge writes to one of them."""

from __future__ import annotations

import warnings

from torch import nn

from .layer import SPPLayer
from .quantized import QuantizedLinear


def untie_adapted_weights(model: nn.Module) -> None:
    """
    Give adapted layers that share their weight with another module a weight of their own.

    A merge writes W' where W was. Other users of W, and other adapters on it, must not see that.

    Args:
        model (`nn.Module`): The model with the adapters.
    """
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    for module in model.modules():
        if not isinstance(module, SPPLayer) or (isinstance(module, QuantizedLinear) and module.quantizes):
            continue  # a merge gives a layer that quantizes a new weight
        base_layer, name = module.get_base_layer(), module.parameter_name
        weight = getattr(base_layer, name)
        if users.get(id(weight), 0) > 1:
            users[id(weight)] -= 1
            copy = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
            setattr(base_layer, name, copy)
            warnings.warn(
                f"The weight of {module.module_name!r} is shared with another module. It gets a copy of its own, "
                "which the adapter is merged into.",
                stacklevel=2,
            )
