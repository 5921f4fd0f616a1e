# SPDX-License-Identifier: Apache-2.0
"""Makes SPP a PEFT method, from outside PEFT.

PEFT has no entry point for plug-ins: `peft.utils.register_peft_method` refuses a name that is not a member of the
`PeftType` enum (huggingface/peft#2273). So the enum gets one more member at run time; everything after that is PEFT's
own registration.
"""

from __future__ import annotations

import enum
from typing import Any

import peft
from packaging.version import Version
from peft import mapping
from peft.utils.peft_types import PeftType, register_peft_method

from ._version import __version__


METHOD = "spp"
MEMBER = METHOD.upper()
PREFIX = f"{METHOD}_"
MIN_PEFT, BELOW_PEFT = "0.19", "0.22"


def register(config_cls: type, model_cls: type) -> None:
    """
    Register the SPP method with PEFT. Calling it again is a no-op.

    Args:
        config_cls (`type`): The configuration class, [`SPPConfig`].
        model_cls (`type`): The tuner class, [`SPPModel`].

    Raises:
        ImportError: If the installed PEFT is not supported, or has a method of this name itself. PEFT is left as it
            was.
    """
    owner = mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(MEMBER)
    if owner is not None and owner.__module__.partition(".")[0] == config_cls.__module__.partition(".")[0]:
        # imported once more under the same process-wide enum (importlib.reload, a purged sys.modules)
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING[MEMBER] = config_cls
        mapping.PEFT_TYPE_TO_TUNER_MAPPING[MEMBER] = model_cls
        return
    if owner is not None or MEMBER in PeftType.__members__ or PREFIX in mapping.PEFT_TYPE_TO_PREFIX_MAPPING.values():
        raise ImportError(
            f"PEFT {peft.__version__} already has a method named {MEMBER}, so peft_spp {__version__} cannot register "
            "its own. Use PEFT's, or install an older PEFT or a newer peft_spp."
        )
    check_peft_version(peft.__version__)
    extend_str_enum(PeftType, MEMBER)
    register_peft_method(name=METHOD, config_cls=config_cls, model_cls=model_cls, is_mixed_compatible=False)


def check_peft_version(version: str) -> None:
    """Raise an `ImportError` if `version` is a PEFT that this package has not been tested with."""
    if not Version(MIN_PEFT) <= Version(version) < Version(BELOW_PEFT):
        raise ImportError(
            f"peft_spp {__version__} supports PEFT >={MIN_PEFT},<{BELOW_PEFT}, but PEFT {version} is installed. "
            f"Run `pip install 'peft>={MIN_PEFT},<{BELOW_PEFT}'` or update peft_spp."
        )


def extend_str_enum(cls: type[enum.Enum], name: str) -> enum.Enum:
    """
    Add a member whose value is its name to a `str` enum, so that it cannot be told from one of the class body.

    Args:
        cls (`type[enum.Enum]`): An enum class that also derives from `str`.
        name (`str`): The name and value of the new member.

    Returns:
        `enum.Enum`: The new member.

    Raises:
        ImportError: If this Python's enum does not know the member afterwards; the class is then as it was before.
    """
    member: Any = str.__new__(cls, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = cls
    member._sort_order_ = len(cls._member_names_)
    cls._member_names_.append(name)
    cls._member_map_[name] = member
    cls._value2member_map_[name] = member
    # Python 3.13 answers `value in cls` from this list
    hashable_values: list[Any] | None = getattr(cls, "_hashable_values_", None)
    if hashable_values is not None:
        hashable_values.append(name)
    # Up to Python 3.11 attribute access falls back to the member map; later versions keep members as class attributes.
    # EnumType.__setattr__ refuses names of members, type.__setattr__ does not.
    type.__setattr__(cls, name, member)

    if not (cls(name) is cls[name] is getattr(cls, name) is member and list(cls)[-1] is member):
        type.__delattr__(cls, name)
        cls._member_names_.remove(name)
        del cls._member_map_[name], cls._value2member_map_[name]
        if hashable_values is not None:
            hashable_values.remove(name)
        raise ImportError(f"peft_spp {__version__} cannot add {name} to {cls.__name__} on this Python version.")
    return member
