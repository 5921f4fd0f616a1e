# SPDX-License-Identifier: Apache-2.0
"""
The types of layers that can be adapted. The first that knows a module adapts it, like PEFT's dispatchers.

A new type is a class in a file, and a function here with a line in `LAYER_TYPES`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..architecture import is_stored_transposed
from ..checkpoints.layout import model_types
from .compressed_experts import is_compressed_stack, parameter_shape
from .config import SPPConfig
from .layer import AdaptedLayer, Linear
from .param_wrapper import ParamWrapper
from .quantized import QuantizedLinear, find_backend
from .targets import check_linear, check_not_split, check_weight


class Request(NamedTuple):
    """A module that is to be adapted."""

    target: nn.Module  # the module, or a tuner layer around it
    config: SPPConfig  # the configuration of the adapter
    module_name: str  # the name in the model, of a parameter with its name
    parameter_name: str | None  # the module's parameter, where `target_parameters` names one
    model_config: dict[str, object]  # the configuration of the model

    @property
    def base_layer(self) -> nn.Module:
        target = self.target
        return target.get_base_layer() if isinstance(target, BaseTunerLayer) else target


Make: TypeAlias = Callable[..., AdaptedLayer]
"""Makes the adapted layer of the target, the name of the adapter, its configuration, r and alpha."""


def parameter(request: Request) -> Make | None:
    """A weight that belongs to no linear layer, such as a stack of experts."""
    if request.parameter_name is None:
        return None
    base_layer, name = request.base_layer, request.parameter_name
    if not is_compressed_stack(base_layer, name):
        check_weight(getattr(base_layer, name), f"Target parameter {request.module_name!r}", dimensions=(2, 3))
    dims = len(parameter_shape(base_layer, name))
    transposed = is_stored_transposed(base_layer, dims, model_types(request.model_config))
    return partial(ParamWrapper, parameter_name=name, is_transposed=transposed)


def quantized(request: Request) -> Make | None:
    """A linear layer with a quantized weight."""
    backend = find_backend(request.base_layer)
    if backend is None:
        return None
    try:
        backend.check(request.base_layer)
    except ValueError as error:
        raise ValueError(f"Target module {request.module_name!r} is not supported: {error}.") from error
    set_fan_in_fan_out(request.config, False)
    return partial(QuantizedLinear, backend=backend)


def linear(request: Request) -> Make | None:
    """An `nn.Linear` or a `Conv1D` with a plain weight."""
    if not isinstance(request.base_layer, (nn.Linear, Conv1D)):
        return None
    check_linear(request.base_layer, request.module_name)
    is_conv1d = isinstance(request.base_layer, Conv1D)
    set_fan_in_fan_out(request.config, is_conv1d)
    return partial(Linear, fan_in_fan_out=is_conv1d, is_target_conv_1d_layer=is_conv1d)


LAYER_TYPES: tuple[Callable[[Request], Make | None], ...] = (parameter, quantized, linear)


def find_layer_type(request: Request) -> Make:
    """How to adapt a module; an error if no type of layer knows it, or the one that does cannot adapt it."""
    if request.parameter_name is None:
        check_not_split(request.base_layer, request.module_name)
    made = (layer_type(request) for layer_type in LAYER_TYPES)
    make = next((one for one in made if one is not None), None)
    if make is None:
        raise ValueError(
            f"Target module {request.module_name!r} ({request.base_layer}) is not supported. Currently, only the "
            "following modules are supported: `torch.nn.Linear`, `transformers.pytorch_utils.Conv1D`, and the "
            "quantized linear layers of bitsandbytes, torchao, HQQ and others. To support another quantization "
            "package, see `peft_spp.tuner.quantized.register_backend`."
        )
    return make


def set_fan_in_fan_out(config: SPPConfig, is_conv1d: bool) -> None:
    """Correct what a configuration says of the way that weights are stored, with PEFT's warning."""
    if config.fan_in_fan_out is not is_conv1d:
        layer_type = "`Conv1D`" if is_conv1d else "`torch.nn.Linear`"
        warnings.warn(
            f"fan_in_fan_out is set to {config.fan_in_fan_out} but the target module is {layer_type}. "
            f"Setting fan_in_fan_out to {is_conv1d}.",
            stacklevel=2,
        )
        config.fan_in_fan_out = is_conv1d
