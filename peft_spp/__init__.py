# SPDX-License-Identifier: Apache-2.0
"""SPP (sparsity-preserved parameter-efficient fine-tuning) for Hugging Face PEFT.

Importing this package registers the method: afterward [`SPPConfig`] works wherever PEFT takes a configuration, and
Transformers loads models with compressed weights.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .other_libraries import quiet_imports


if TYPE_CHECKING:
    from .callbacks import SPPGuardCallback
    from .compressed import BitmaskConfig, CompressedLinear, compress, decompress
    from .hotswap import hotswap_adapter, hotswap_adapter_from_state_dict, prepare_model_for_compiled_hotswap
    from .hub import push_to_hub
    from .optimizers import spp_parameter_groups
    from .tuner import SPPConfig, SPPLayer, SPPModel

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
    "spp_parameter_groups",
]

# imported when they are asked for: Transformers' trainer, for one, is a slow import that only training needs
_MODULES = {
    "BitmaskConfig": "compressed",
    "CompressedLinear": "compressed",
    "SPPConfig": "tuner",
    "SPPGuardCallback": "callbacks",
    "SPPLayer": "tuner",
    "SPPModel": "tuner",
    "compress": "compressed",
    "decompress": "compressed",
    "hotswap_adapter": "hotswap",
    "hotswap_adapter_from_state_dict": "hotswap",
    "prepare_model_for_compiled_hotswap": "hotswap",
    "push_to_hub": "hub",
    "spp_parameter_groups": "optimizers",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def register_methods() -> None:
    """Register SPP with PEFT, and compressed weights with Transformers. Calling it again is a no-op."""
    with quiet_imports():
        from .peft_version import check_peft

        # before the parts of PEFT that it looks for are imported
        check_peft()
        from .compressed import register as register_compressed
        from .registration import register
        from .tuner import SPPConfig, SPPModel

    register(SPPConfig, SPPModel)
    register_compressed()


# the program `peft-spp` shows its help without PEFT; its commands register when they run
if not getattr(sys.modules.get("peft_spp_command"), "starting", False):
    register_methods()
