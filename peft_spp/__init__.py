# SPDX-License-Identifier: Apache-2.0
"""SPP (sparsity-preserved parameter-efficient fine-tuning) for Hugging Face PEFT.

Importing this package registers the method: afterwards [`SPPConfig`] works wherever PEFT takes a configuration.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._version import __version__
from .registration import register
from .tuner import SPPConfig, SPPLayer, SPPModel


if TYPE_CHECKING:
    from .callbacks import SPPGuardCallback

register(SPPConfig, SPPModel)

__all__ = ["SPPConfig", "SPPGuardCallback", "SPPLayer", "SPPModel", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "SPPGuardCallback":
        # Transformers' trainer is a slow import, and only training needs it
        from .callbacks import SPPGuardCallback

        return SPPGuardCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
