# SPDX-License-Identifier: Apache-2.0
"""A tensor that is not read yet, as a file, a state dict or a model lists it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stored:
    """One tensor as a source lists it."""

    key: str  # the name it is stored under
    shape: tuple[int, ...]
    dtype: torch.dtype | str  # its dtype, or the name of one that cannot be read
    load: Callable[[], Tensor]  # reads it
    transposed: bool | None = None  # whether it is stored `(in, out)`, where its module tells
    linear: bool | None = None  # whether it is a linear layer's weight; `None` where only the name can tell
    problem: str | None = None  # why zeros cannot be told in it, beyond its dtype
    no_data: bool = False  # whether it is on the meta device
