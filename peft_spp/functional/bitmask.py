# SPDX-License-Identifier: Apache-2.0
"""
Weights whose zeros are not stored: a bitmask and the values. This is the format in PyTorch's own operations, which all
kernels are tested against.

A place of the weight has one bit, set unless the place is `+0.0`; `-0.0`, infinities and NaN are stored as they are,
so that nothing is lost. Bit `j % 8` of byte `j // 8` of a row belongs to column `j`, and rows are padded with zero
bits to whole words of 64 places. The values follow each other row by row. Where a row's values begin is counted from
the bitmask and never read from a file. A merge leaves the places as they are, so a value that it makes `+0.0` stays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


WORD = 64
"""Rows of the bitmask are padded to a multiple of this many places."""

BITS: dict[torch.dtype, torch.dtype] = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
"""The dtypes of weights that can be compressed, and the integers that show their bits."""

# how many places are looked at together: temporaries stay small
_CHUNK_ELEMENTS = 1 << 22


class Compressed(NamedTuple):
    """A weight `(..., m, n)` without its zeros.

    Args:
        values (`torch.Tensor`): The stored values, row by row, shape `(stored,)`; float32, bfloat16 or float16.
        bitmask (`torch.Tensor`): uint8, shape `(..., m, ceil(n / 64) * 8)`.
        row_offsets (`torch.Tensor`): int64, shape `(rows + 1,)`, with `rows` the product of all dimensions but the
            last: row `i` has `values[row_offsets[i] : row_offsets[i + 1]]`.
        columns (`int`): n.
    """

    values: Tensor
    bitmask: Tensor
    row_offsets: Tensor
    columns: int

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight."""
        return torch.Size((*self.bitmask.shape[:-1], self.columns))


def one_of_stack(stack: Compressed, index: int) -> Compressed:
    """
    One weight of a stack, with the values of all of them.

    Args:
        stack ([`Compressed`]): The weights, shape `(E, m, n)`.
        index (`int`): Which one.

    Returns:
        [`Compressed`]: shape `(m, n)`, not a copy.
    """
    m = stack.bitmask.shape[1]
    row_offsets = stack.row_offsets[index * m : (index + 1) * m + 1]
    return Compressed(stack.values, stack.bitmask[index], row_offsets, stack.columns)


def bitmask_bytes(columns: int) -> int:
    """How many bytes a row of the bitmask has."""
    return -(-columns // WORD) * (WORD // 8)


def compress(weight: Tensor) -> Compressed:
    """
    Store a weight without its zeros.

    Args:
        weight (`torch.Tensor`): float32, bfloat16 or float16, shape `(..., m, n)`, any strides.

    Returns:
        [`Compressed`]: On the same device.

    Raises:
        ValueError: If the dtype is another one, or the weight has fewer than two dimensions.
    """
    if weight.dtype not in BITS or weight.ndim < 2:
        raise ValueError(
            f"cannot compress a weight of shape {tuple(weight.shape)} and dtype {weight.dtype}: it must have at least "
            "two dimensions and be float32, bfloat16 or float16"
        )
    n = weight.shape[-1]
    rows = weight.detach().resolve_neg().reshape(math.prod(weight.shape[:-1]), n)
    bitmask = torch.empty(len(rows), bitmask_bytes(n), dtype=torch.uint8, device=weight.device)
    for part in _row_chunks(rows):
        bitmask[part] = _pack_bits(_stored_places(rows[part]))
    row_offsets = count_row_offsets(bitmask)
    # of the right size at once: a layer is compressed in the memory that it needs afterwards
    values = rows.new_empty(int(row_offsets[-1]))
    for part in _row_chunks(rows):
        _put_stored(values[row_offsets[part.start] : row_offsets[part.stop]], rows[part].contiguous())
    return Compressed(values, bitmask.view(*weight.shape[:-1], bitmask.shape[-1]), row_offsets, n)


def count_stored(weight: Tensor) -> int:
    """How many places of a weight are not `+0.0`."""
    rows = weight.detach().resolve_neg().reshape(math.prod(weight.shape[:-1]), weight.shape[-1])
    return sum(int(_stored_places(rows[part]).count_nonzero()) for part in _row_chunks(rows))


def decompress(compressed: Compressed) -> Tensor:
    """
    The weight that was compressed, bit for bit.

    Args:
        compressed ([`Compressed`]): The weight; see [`check_compressed`] for one that comes from a file.

    Returns:
        `torch.Tensor`: shape `(..., m, n)`, contiguous.
    """
    values, bitmask, row_offsets, n = compressed
    weight = values.new_zeros(compressed.shape)
    rows = weight.view(len(row_offsets) - 1, n)
    bits = bitmask.reshape(len(rows), bitmask.shape[-1])
    for part in _row_chunks(rows):
        first, last = row_offsets[part.start], row_offsets[part.stop]
        rows[part].masked_scatter_(unpack_bits(bits[part], n), values[first:last])
    return weight


def stored_places(compressed: Compressed) -> Tensor:
    """Which places of the weight are stored, as a boolean tensor of its shape."""
    bits = compressed.bitmask
    rows = bits.reshape(math.prod(bits.shape[:-1]), bits.shape[-1])
    return unpack_bits(rows, compressed.columns).reshape(compressed.shape)


def transposed_mask(weight: Compressed) -> Compressed:
    """
    The stored places of the transposed weight, each with a 1. Nothing of the weight's size is made.

    Args:
        weight ([`Compressed`]): The weight, shape `(..., m, n)`.

    Returns:
        [`Compressed`]: shape `(..., n, m)`.
    """
    *layers, m, n = weight.shape
    bitmask = weight.bitmask.new_empty(math.prod(layers), n, bitmask_bytes(m))
    for turned, own in zip(bitmask, weight.bitmask.reshape(len(bitmask), m, weight.bitmask.shape[-1]), strict=True):
        turned.copy_(_pack_bits(unpack_bits(own, n).t()))
    bitmask = bitmask.view(*layers, n, bitmask.shape[-1])
    return Compressed(weight.values.new_ones(()).expand(weight.values.shape), bitmask, count_row_offsets(bitmask), m)


def count_row_offsets(bitmask: Tensor) -> Tensor:
    """Where the values of each row begin, counted from the bitmask; the last one is the number of stored values."""
    rows = bitmask.reshape(math.prod(bitmask.shape[:-1]), bitmask.shape[-1])
    ones = _ones_in_bytes(bitmask.device)
    counts = [ones[rows[part].int()].sum(1) for part in _row_chunks(rows)]
    return torch.cat([ones.new_zeros(1), *counts]).cumsum(0)


def check_compressed(values: Tensor, bitmask: Tensor, shape: Sequence[int], name: str) -> Tensor:
    """
    Check that a bitmask and values fit each other and the shape, before anything is read by them; returns the row
    offsets.
    """
    *rows, n = shape
    expected = (*rows, bitmask_bytes(n))
    if values.dtype not in BITS or values.ndim != 1:
        raise ValueError(
            f"{name}: the values have shape {tuple(values.shape)} and dtype {values.dtype}, and must be a vector of "
            "float32, bfloat16 or float16"
        )
    if bitmask.dtype != torch.uint8 or tuple(bitmask.shape) != expected:
        raise ValueError(
            f"{name}: the bitmask has shape {tuple(bitmask.shape)} and dtype {bitmask.dtype}, but a weight of shape "
            f"{tuple(shape)} has one of shape {expected} and dtype torch.uint8"
        )
    return count_checked(values, bitmask, n, name)


def count_checked(values: Tensor, bitmask: Tensor, n: int, name: str) -> Tensor:
    """Count the row offsets of a bitmask of `n` columns, and check that it has a bit for each value and no other."""
    padding = bitmask[..., n // 8 :].clone()
    if padding.numel() and n % 8:
        padding[..., 0] &= 0x100 - (1 << n % 8)
    if padding.any():
        raise ValueError(f"{name}: the bitmask has bits beyond the last of {n} columns")
    row_offsets = count_row_offsets(bitmask)
    if int(row_offsets[-1]) != len(values):
        raise ValueError(f"{name}: the bitmask has {int(row_offsets[-1])} bits, and there are {len(values)} values")
    return row_offsets


def is_worth_it(stored: int, shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether a weight takes fewer bytes compressed than dense: at 2 bytes a value, from about 1/16 zeros on."""
    *rows, n = shape
    compressed = stored * dtype.itemsize + math.prod(rows) * bitmask_bytes(n)
    return compressed < math.prod(shape) * dtype.itemsize


def _row_chunks(rows: Tensor) -> list[slice]:
    step = max(1, _CHUNK_ELEMENTS // max(rows.shape[1], 1))
    return [slice(start, min(start + step, len(rows))) for start in range(0, len(rows), step)]


def _stored_places(rows: Tensor) -> Tensor:
    return rows.contiguous().view(BITS[rows.dtype]) != 0


def _put_stored(values: Tensor, rows: Tensor) -> None:
    places = _stored_places(rows)
    if rows.device.type != "cpu":
        values.copy_(rows[places])
        return
    # PyTorch would write down the index of each place, in nine times the time
    bits = BITS[rows.dtype]
    np.compress(places.numpy().ravel(), rows.view(bits).numpy().ravel(), out=values.view(bits).numpy())


def _pack_bits(stored: Tensor) -> Tensor:
    rows, n = stored.shape
    padded = torch.nn.functional.pad(stored, (0, bitmask_bytes(n) * 8 - n))
    if stored.device.type == "cpu":
        return torch.from_numpy(np.packbits(padded.numpy(), axis=1, bitorder="little"))
    weights = torch.tensor([1 << j for j in range(8)], dtype=torch.uint8, device=stored.device)
    return (padded.view(rows, -1, 8) * weights).sum(2, dtype=torch.uint8)


def unpack_bits(bitmask: Tensor, n: int) -> Tensor:
    """Which places a bitmask has, as booleans of shape `(rows, n)`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bitmask.device)
    return (bitmask.unsqueeze(2) >> shifts).bitwise_and_(1).view(len(bitmask), bitmask.shape[1] * 8)[:, :n].bool()


@cache
def _ones_in_bytes(device: Any) -> Tensor:
    return torch.tensor([bin(byte).count("1") for byte in range(256)], device=device)
