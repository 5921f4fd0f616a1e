# SPDX-License-Identifier: Apache-2.0
"""SPP (sparsity-preserved parameter-efficient fine-tuning) for Hugging Face PEFT.

Importing this package registers the method: afterward [`SPPConfig`] works wherever PEFT takes a configuration, and
Transformers loads models with compressed weights.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .compressed import BitmaskConfig, CompressedLinear, compress, decompress
from .compressed import register as _register_compressed
from .registration import register
from .tuner import SPPConfig, SPPLayer, SPPModel


if TYPE_CHECKING:
    from .callbacks import SPPGuardCallback
    from .hotswap import hotswap_adapter, hotswap_adapter_from_state_dict, prepare_model_for_compiled_hotswap
    from .hub import push_to_hub

register(SPPConfig, SPPModel)
_register_compressed()

__all__ = [
    "BitmaskConfig",
    "CompressedLinear",
    "SPPConfig",
    "SPPGuardCallback",
    "SPPLayer",
    "SPPModel",
    "__version__",
    "compress",
    "decompress",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "prepare_model_for_compiled_hotswap",
    "push_to_hub",
]

# imported when they are asked for: Transformers' trainer, for one, is a slow import that only training needs
_MODULES = {
    "SPPGuardCallback": "callbacks",
    "hotswap_adapter": "hotswap",
    "hotswap_adapter_from_state_dict": "hotswap",
    "prepare_model_for_compiled_hotswap": "hotswap",
    "push_to_hub": "hub",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
