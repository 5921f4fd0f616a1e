# SPDX-License-Identifier: Apache-2.0
"""The PEFT tuner: configuration, layer and model."""

from .config import SPPConfig
from .layer import Linear
from .layer_factors import SPPLayer
from .model import SPPModel
from .param_wrapper import ParamWrapper


__all__ = ["Linear", "ParamWrapper", "SPPConfig", "SPPLayer", "SPPModel"]
