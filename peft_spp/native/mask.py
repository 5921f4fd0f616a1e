# SPDX-License-Identifier: Apache-2.0
"""Sums over the mask of a weight in one pass: `mask.cpp`, through ctypes."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .library import load_library


# those whose zeros show in all bits but the first
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class _Mask(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("transposed", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("numbers", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("histogram", ctypes.c_void_p),
    )


def mask_sums(weight: Tensor, word_numbers: Tensor) -> tuple[Tensor, Tensor] | None:
    """
    Sum the mixed words of each row of a weight's mask modulo 2^64, shape `(2, out)`, and count each of the words' 256
    bytes. `None` if there is no compiled pass for this weight. `-0.0` counts as zero and NaN does not.
    """
    transposed = weight.stride(0) < weight.stride(1)
    if weight.device.type != "cpu" or weight.dtype not in _DTYPES or weight.stride(0 if transposed else 1) != 1:
        return None
    library = load_library()
    if library is None:
        return None
    sums = torch.empty(2, len(weight), dtype=torch.int64, device=weight.device)
    histogram = torch.zeros(256, dtype=torch.int64, device=weight.device)
    mask = _Mask(
        *weight.shape,
        transposed,
        weight.stride(1 if transposed else 0),
        word_numbers.data_ptr(),
        sums.data_ptr(),
        histogram.data_ptr(),
    )
    function = getattr(library, f"mask_sums_{weight.element_size()}")
    function(ctypes.c_void_p(weight.data_ptr()), ctypes.byref(mask))
    return sums, histogram
