# SPDX-License-Identifier: Apache-2.0
"""Whether the row offsets of a module are those of its bitmask still: its tensors can be written by anybody."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from ..functional.bitmask import count_checked


_Seen = tuple["weakref.ref[Tensor]", int, int]


class Counted:
    """What the row offsets of a compressed weight were counted of."""

    def __init__(self) -> None:
        self._own: _Seen | None = None
        self._others: tuple[_Seen, Tensor] | None = None

    def __reduce__(self) -> Any:
        return Counted, ()  # a copy counts for itself

    def note(self, values: Tensor, bitmask: Tensor) -> None:
        """Note that the module's row offsets are those of these tensors."""
        self._own, self._others = _seen(values, bitmask), None

    def row_offsets(self, values: Tensor, bitmask: Tensor, own: Tensor, columns: int, name: str) -> Tensor:
        """
        The row offsets of a bitmask: the module's `own`, or counted again if that was replaced or written since.

        The module keeps its own, as the others may be there for one call only. Nothing is compared while tracing.

        Raises:
            ValueError: If values and bitmask do not fit each other.
        """
        now = _seen(values, bitmask)
        if now is None or _is_same(now, self._own):
            return own
        if self._others is None or not _is_same(now, self._others[0]):
            # a gradient may need them later
            with torch.inference_mode(False), torch.no_grad():
                self._others = now, count_checked(values, bitmask, columns, name)
        return self._others[1]


def _is_same(now: _Seen, before: _Seen | None) -> bool:
    return before is not None and now[0]() is before[0]() and now[1:] == before[1:]


def _seen(values: Tensor, bitmask: Tensor) -> _Seen | None:
    """What tells tensors from later ones; `None` while tracing, and where the values are not here."""
    if torch.compiler.is_compiling() or type(bitmask) is not Tensor or bitmask.is_meta or values.is_meta:
        return None
    if hasattr(values, "ds_shape") or not values.numel():  # partitioned by ZeRO-3
        return None
    return weakref.ref(bitmask), 0 if bitmask.is_inference() else bitmask._version, values.numel()
