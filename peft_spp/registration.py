# SPDX-License-Identifier: Apache-2.0
"""Makes SPP a PEFT method, from outside PEFT.

PEFT has no entry point for plug-ins: `peft.utils.register_peft_method` refuses a name that is not a member of the
`PeftType` enum (huggingface/peft#2273). So the enum gets one more member at run time; everything after that is PEFT's
own registration. And PEFT writes an adapter where it will be read, file after file, and loads one in steps; so
`PeftModel.save_pretrained` and the entrances for loading are wrapped, for SPP adapters only, to make that durable and
to check an adapter before a model is changed for it. PEFT's LoRA+, which does not know SPP's factors, warns of them.
"""

from __future__ import annotations

import peft
from peft import mapping
from peft.utils.peft_types import PeftType, register_peft_method

from ._version import __version__
from .enum_extension import extend_str_enum
from .optimizers import warn_in_optimizers
from .tuner.load_checks import guard_entrances
from .tuner.saving import save_durably


METHOD = "spp"
MEMBER = METHOD.upper()
PREFIX = f"{METHOD}_"


def register(config_cls: type, model_cls: type) -> None:
    """
    Register the SPP method with PEFT. Calling it again is a no-op.

    Args:
        config_cls (`type`): The configuration class, [`SPPConfig`].
        model_cls (`type`): The tuner class, [`SPPModel`].

    Raises:
        ImportError: If the installed PEFT already has a method of this name. PEFT is not changed then.
    """
    owner = mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(MEMBER)  # type: ignore[call-overload]
    if owner is not None and owner.__module__.partition(".")[0] == config_cls.__module__.partition(".")[0]:
        # imported once more under the same process-wide enum (importlib.reload, a purged sys.modules)
        member = PeftType(MEMBER)
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING[member] = config_cls
        mapping.PEFT_TYPE_TO_TUNER_MAPPING[member] = model_cls
        return
    if owner is not None or MEMBER in PeftType.__members__ or PREFIX in mapping.PEFT_TYPE_TO_PREFIX_MAPPING.values():
        raise ImportError(
            f"PEFT {peft.__version__} already has a method named {MEMBER}, so peft_spp {__version__} cannot register "
            "its own. Use PEFT's, or install an older PEFT or a newer peft_spp."
        )
    setattr(peft.PeftModel, "save_pretrained", save_durably(peft.PeftModel.save_pretrained))  # noqa: B010  (for mypy)
    guard_entrances()
    warn_in_optimizers()
    extend_str_enum(PeftType, MEMBER)
    register_peft_method(name=METHOD, config_cls=config_cls, model_cls=model_cls, is_mixed_compatible=False)
