# SPDX-License-Identifier: Apache-2.0
"""What a source lists before anything is read: its tensors, and the weights of linear layers among them."""

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


@dataclass(frozen=True)
class Weight:
    """One weight of a source, not yet read.

    Args:
        name (`str`): The plain name of its module.
        shape (`tuple[int, ...]`): Its shape as stored.
        dtype (`str`): Its dtype, such as `"bfloat16"`.
        transposed (`bool`): Whether it is stored `(in, out)` and not `(out, in)`.
        load (`Callable[[], torch.Tensor]`): Reads it.
        left_out (`str` or `None`): Why it does not count, if it does not.
        unreadable (`str` or `None`): Why zeros cannot be told in it, if they cannot.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    transposed: bool
    load: Callable[[], Tensor]
    left_out: str | None = None
    unreadable: str | None = None


@dataclass(frozen=True)
class Weights:
    """The weights of a source that may be linear layers.

    Args:
        label (`str`): What to call the source.
        found (`dict[str, Weight]`): The weights that were asked for, by plain module name, in the order stored.
    """

    label: str
    found: dict[str, Weight]

    @property
    def linear(self) -> dict[str, Weight]:
        """The weights of linear layers, readable or not."""
        return {name: weight for name, weight in self.found.items() if weight.left_out is None}

    @property
    def skipped(self) -> dict[str, str]:
        """Why each weight that is not counted is not."""
        reasons = ((name, weight.left_out or weight.unreadable) for name, weight in self.found.items())
        return {name: reason for name, reason in reasons if reason}
