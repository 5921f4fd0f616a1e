# SPDX-License-Identifier: Apache-2.0
"""Zeros, negative zeros and non-finite values, told from the bits of a weight."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


CHUNK_ELEMENTS = 1 << 20
"""How many weights are looked at together: temporaries stay well below 64 MB, even for float64."""


class Format(NamedTuple):
    """How a floating dtype writes its values.

    Args:
        integer (`torch.dtype`): The signed integer dtype of the same size.
        non_finite (`int`): The bits that are all set in infinities and NaNs, and in nothing else.
        negative_zero (`bool`): Whether a lone sign bit is `-0.0` (in the `fnuz` formats it is their only NaN).
    """

    integer: torch.dtype
    non_finite: int
    negative_zero: bool = True


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


class Look(NamedTuple):
    """What a piece of a weight holds.

    Args:
        nonzero (`torch.Tensor`): Boolean, the shape of the piece: neither `0.0` nor `-0.0`.
        negative_zeros (`int`): How many are `-0.0`.
        non_finite (`int`): How many are infinite or NaN.
    """

    nonzero: Tensor
    negative_zeros: int
    non_finite: int


def look_at(piece: Tensor) -> Look:
    """Tell zeros, negative zeros and non-finite values apart, on the device where the weight lives.

    Args:
        piece (`torch.Tensor`): Floating, any shape, of one of [`FORMATS`]; without gradient history.

    Returns:
        `Look`: The mask and the counts.

    Raises:
        ValueError: If the dtype cannot be read or the tensor holds no data (meta device).
    """
    if piece.dtype not in FORMATS:
        raise ValueError(f"cannot tell zeros in a weight of dtype {piece.dtype}")
    if piece.is_meta:
        raise ValueError("the weight is on the meta device and holds no data")
    written = FORMATS[piece.dtype]
    bits = piece.view(written.integer)
    nonzero = bits != 0
    if piece.numel() == 0:
        return Look(nonzero, 0, 0)
    lowest = torch.iinfo(written.integer).min
    negative_zeros = non_finite = 0
    if not written.negative_zero:
        non_finite = int(torch.count_nonzero(bits == lowest))
        return Look(nonzero, 0, non_finite)
    non_finite = int(torch.count_nonzero((bits & written.non_finite) == written.non_finite))
    if int(bits.amin()) == lowest:  # the sign bit alone is the smallest integer there is
        unsigned = bits != lowest
        negative_zeros = piece.numel() - int(torch.count_nonzero(unsigned))
        nonzero &= unsigned
    return Look(nonzero, negative_zeros, non_finite)
