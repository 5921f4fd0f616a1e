# SPDX-License-Identifier: Apache-2.0
"""One more member for an existing enum. Standard library only, so that it is tested on every Python version."""

from __future__ import annotations

import enum
from typing import Any


def extend_str_enum(cls: type[enum.Enum], name: str) -> enum.Enum:
    """Add a member whose value is its name to a `str` enum, so that it cannot be told from one of the class body."""
    member: Any = str.__new__(cls, name)  # type: ignore[type-var]
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
        raise ImportError(f"Cannot add the member {name} to the enum {cls.__name__} on this Python version.")
    return member
