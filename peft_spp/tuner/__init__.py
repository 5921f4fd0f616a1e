# SPDX-License-Identifier: Apache-2.0
"""The PEFT tuner: configuration, layer and model."""

from .config import SPPConfig
from .layer import Linear, SPPLayer
from .model import SPPModel


__all__ = ["Linear", "SPPConfig", "SPPLayer", "SPPModel"]
