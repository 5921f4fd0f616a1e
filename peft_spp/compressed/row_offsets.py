# SPDX-License-Identifier: Apache-2.0
"""Whether the counted row offsets are those of a bitmask still: tensors of a module can be written by anybody."""

from __future__ import annotations

import torch
from torch import Tensor


Seen = tuple[Tensor, int, int]


def seen(values: Tensor, bitmask: Tensor) -> Seen | None:
    """What tells a bitmask and its values from later ones; `None` where there are none to count, or while tracing."""
    if torch.compiler.is_compiling() or type(bitmask) is not Tensor or bitmask.is_meta or values.is_meta:
        return None
    return bitmask, 0 if bitmask.is_inference() else bitmask._version, values.numel()


def is_same(now: Seen, before: Seen | None) -> bool:
    """Whether a bitmask was neither replaced nor written since it was counted."""
    return before is not None and now[0] is before[0] and now[1:] == before[1:]
