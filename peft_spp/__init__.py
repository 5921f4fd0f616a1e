# SPDX-License-Identifier: Apache-2.0
"""SPP (sparsity-preserved parameter-efficient fine-tuning) for Hugging Face PEFT.

Importing this package registers the method: afterwards [`SPPConfig`] works wherever PEFT takes a configuration.
"""

from ._version import __version__
from .hotswap import hotswap_adapter, hotswap_adapter_from_state_dict
from .hub import push_to_hub
from .registration import register
from .tuner import SPPConfig, SPPLayer, SPPModel


register(SPPConfig, SPPModel)

__all__ = [
    "SPPConfig",
    "SPPLayer",
    "SPPModel",
    "__version__",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "push_to_hub",
]
