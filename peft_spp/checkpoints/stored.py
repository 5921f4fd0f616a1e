# SPDX-License-Identifier: Apache-2.0
"""A tensor that is not read yet, as a file, a state dict or a model lists it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stored:
    """One tensor as a source lists it.

    Args:
        key (`str`): The name it is stored under.
        shape (`tuple[int, ...]`): Its shape.
        dtype (`torch.dtype` or `str`): Its dtype, or the name of one that cannot be read.
        load (`Callable[[], torch.Tensor]`): Reads it.
        transposed (`bool` or `None`): Whether it is stored `(in, out)`, where its module tells.
        linear (`bool` or `None`): Whether it is a linear layer's weight; `None` where only the name can tell.
        problem (`str` or `None`): Why zeros cannot be told in it, beyond its dtype.
        no_data (`bool`): Whether it is on the meta device.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype | str
    load: Callable[[], Tensor]
    transposed: bool | None = None
    linear: bool | None = None
    problem: str | None = None
    no_data: bool = False
