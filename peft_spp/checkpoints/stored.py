# SPDX-License-Identifier: Apache-2.0
"""A tensor that is not read yet, as a file, a state dict or a model lists it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


# tensors may be embeddings, of which no second copy is made
_PIECE = 1 << 22


@dataclass(frozen=True)
class Stored:
    """One tensor as a source lists it."""

    key: str  # the name it is stored under
    shape: tuple[int, ...]
    dtype: torch.dtype | str  # its dtype, or the file's name of one that holds no weights
    load: Callable[[], Tensor]  # reads it
    transposed: bool | None = None  # whether it is stored `(in, out)`, where its module tells
    linear: bool | None = None  # whether it is a linear layer's weight; `None` where only the name can tell
    problem: str | None = None  # why zeros cannot be told in it, beyond its dtype
    no_data: bool = False  # whether it is on the meta device
    size: int | None = None  # the bytes that it takes, if it is stored without its zeros


def count_non_finite(tensor: Tensor) -> int:
    """How many values of a tensor of any dtype are NaN or infinite."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return 0
    # PyTorch does not test formats of one byte
    pieces = (one.float() if one.element_size() == 1 else one for one in tensor.reshape(-1).split(_PIECE))
    return sum(int((~torch.isfinite(piece)).sum()) for piece in pieces)
