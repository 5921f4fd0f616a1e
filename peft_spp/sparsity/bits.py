# SPDX-License-Identifier: Apache-2.0
"""Zeros, negative zeros and non-finite values, told from the bits of a weight."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


CHUNK_ELEMENTS = 1 << 19
"""How many weights are looked at together on CPU: temporaries stay in the caches, and the calls cost little."""

CHUNK_ELEMENTS_ON_ACCELERATOR = 1 << 23
"""The same elsewhere, where few large kernels beat many small ones; temporaries stay below 128 MB."""


class Format(NamedTuple):
    """How a floating dtype writes its values."""

    integer: torch.dtype  # the signed integer dtype of the same size
    non_finite: int  # the bits from which on, sign aside, a value is infinite or NaN
    negative_zero: bool = True  # whether a lone sign bit is `-0.0` (in the `fnuz` formats it is their only NaN)


FORMATS: dict[torch.dtype, Format] = {
    torch.float64: Format(torch.int64, 0x7FF0000000000000),
    torch.float32: Format(torch.int32, 0x7F800000),
    torch.float16: Format(torch.int16, 0x7C00),
    torch.bfloat16: Format(torch.int16, 0x7F80),
    torch.float8_e5m2: Format(torch.int8, 0x7C),
    torch.float8_e4m3fn: Format(torch.int8, 0x7F),
    torch.float8_e5m2fnuz: Format(torch.int8, -0x80, negative_zero=False),
    torch.float8_e4m3fnuz: Format(torch.int8, -0x80, negative_zero=False),
}
"""The dtypes that can be read."""


def count_true(values: Tensor) -> int:
    """How many of a boolean tensor are true."""
    # numpy counts several times faster than torch does on CPU
    return int(np.count_nonzero(values.numpy()) if values.device.type == "cpu" else torch.count_nonzero(values))


class Look(NamedTuple):
    """What a piece of a weight holds."""

    nonzero: Tensor  # boolean, the shape of the piece: neither `0.0` nor `-0.0`
    negative_zeros: int  # how many are `-0.0`
    non_finite: int  # how many are infinite or NaN


def look_at(piece: Tensor) -> Look:
    """Tell zeros, negative zeros and non-finite values apart, on the device where the weight lives."""
    if piece.dtype not in FORMATS:
        raise ValueError(f"cannot count the zeros in a weight of dtype {piece.dtype}")
    if piece.is_meta:
        raise ValueError("the weight is on the meta device and holds no data")
    written = FORMATS[piece.dtype]
    bits: Any = piece.view(written.integer)
    if piece.numel() == 0:
        return Look(bits != 0, 0, 0)
    on_cpu = piece.device.type == "cpu"
    if on_cpu:
        bits = bits.numpy()  # which compares and counts integers several times faster than torch on CPU
    count = np.count_nonzero if on_cpu else torch.count_nonzero
    limits = torch.iinfo(written.integer)
    negative_zeros = non_finite = 0
    # the sign bit alone is the smallest integer there is
    alone = int(count(bits == limits.min)) if bits.min() == limits.min else 0
    if written.negative_zero:
        negative_zeros = alone
        size = bits & limits.max
        nonzero = size != 0
        if size.max() >= written.non_finite:
            non_finite = int(count(size >= written.non_finite))
    else:
        nonzero, non_finite = bits != 0, alone
    return Look(torch.from_numpy(nonzero) if on_cpu else nonzero, negative_zeros, non_finite)
