# SPDX-License-Identifier: Apache-2.0
"""Which versions of PEFT can be used: those that were tested, and newer ones that have what is used of them."""

from __future__ import annotations

import importlib
import warnings
from functools import reduce

import peft
from packaging.version import Version

from ._version import __version__


# from 0.21 on, PEFT lets a method name and check the tensors that it saves and loads; 0.21.0 fails on the
# encoder-decoder models of newer Transformers
MIN_PEFT, UNTESTED_PEFT = "0.21.2", "0.22"

# what is used of PEFT beyond its documented API; docs/contributing.md says what for
_RELIED_ON = {
    "peft.tuners.tuners_utils": (
        "BaseTuner._check_new_adapter_config",
        "BaseTuner._check_target_module_exists",
        "BaseTuner._inject_parameters",
        "BaseTuner._pre_injection_hook",
        "BaseTuner._prepare_adapter_config",
        "BaseTuner._unload_and_optionally_merge",
        "BaseTuner._get_adapter_state_dict",
        "BaseTuner._remap_adapter_state_dict_for_load",
        "BaseTuner._remove_adapter_name_from_key",
        "BaseTunerLayer._get_base_layer_device_and_dtype",
        "BaseTunerLayer._move_adapter_to_device_of_base_layer",
        "_ExcludedModule",
        "_maybe_include_all_linear_layers",
        "onload_layer",
    ),
    "peft.utils.other": ("AuxiliaryTrainingWrapper.adapter_state_dict_load_map", "get_pattern_key"),
    "peft.config": ("PeftConfigMixin._split_kwargs", "PeftConfigMixin._get_peft_type"),
    "peft.utils.peft_types": ("register_peft_method",),
    "peft.optimizers.loraplus": ("get_parameter_names",),
    "peft.optimizers.lorafa": ("LoraFAOptimizer.__init__",),
}


def check_peft() -> None:
    """
    Check that the installed PEFT can be used, before anything of it is changed. A warning says that it is newer than
    what this package was tested with.
    """
    version = peft.__version__
    if Version(version) < Version(MIN_PEFT):
        raise ImportError(
            f"peft_spp {__version__} needs PEFT {MIN_PEFT} or newer, but PEFT {version} is installed. "
            f"Run `pip install -U 'peft>={MIN_PEFT}'`."
        )
    if Version(version) < Version(UNTESTED_PEFT):
        return
    if missing := _missing():
        raise ImportError(
            f"peft_spp {__version__} was tested with PEFT >={MIN_PEFT},<{UNTESTED_PEFT}, and PEFT {version} lacks "
            f"{', '.join(missing)}. Run `pip install 'peft>={MIN_PEFT},<{UNTESTED_PEFT}'` or update peft_spp."
        )
    warnings.warn(
        f"peft_spp {__version__} was tested with PEFT >={MIN_PEFT},<{UNTESTED_PEFT}, and PEFT {version} is installed. "
        f"It has all that peft_spp uses. If something fails, run `pip install 'peft<{UNTESTED_PEFT}'` or update "
        "peft_spp.",
        stacklevel=2,
    )


def _missing() -> list[str]:
    missing = []
    for module_name, names in _RELIED_ON.items():
        for name in names:
            try:
                reduce(getattr, name.split("."), importlib.import_module(module_name))
            except (ImportError, AttributeError):
                missing.append(f"{module_name}.{name}")
    return missing
