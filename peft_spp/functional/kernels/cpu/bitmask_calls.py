# SPDX-License-Identifier: Apache-2.0
"""How `bitmask_*.cpp` is called: which of it runs here, and the structures of `bitmask.h`."""

from __future__ import annotations

import ctypes
import sys
import threading
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ....native.library import load_library
from ...bitmask import Compressed


# bytes of a line of the caches
LINE = 64
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_TIERS = ("portable", "avx2", "avx512")
_CAPABILITIES = {"AVX2": 1, "AVX512": 2}


def _structure(name: str, fields: str, pointers: str = "") -> type[ctypes.Structure]:
    types = [(field, ctypes.c_void_p if field in pointers.split() else ctypes.c_int64) for field in fields.split()]
    return type(name, (ctypes.Structure,), {"_fields_": types})


Weight = _structure("Weight", "values bitmask row_offsets stored m n", "values bitmask row_offsets")
Part = _structure("Part", "row rows column columns stride starts ends threads", "starts ends")
Tokens = _structure(
    "Tokens",
    "x x_stride count A B r inputs bias y sums identity first last threads",
    "x A B inputs bias y sums",
)


@cache
def tier() -> str | None:
    """The kernels that run here: `"avx512"`, `"avx2"` or `"portable"`; `None` if nothing is compiled."""
    library = load_library("bitmask") if sys.byteorder == "little" else None
    if library is None:
        return None
    capability = _CAPABILITIES.get(torch.backends.cpu.get_cpu_capability(), 0)
    return _TIERS[min(capability, library.bitmask_tier())]


_reused = threading.local()


def scratch(size: int) -> int:
    """The address of a buffer of this thread: a new one costs page faults, which a small layer notices."""
    if getattr(_reused, "size", 0) < size:
        _reused.buffer, _reused.size = ctypes.create_string_buffer(size + LINE), size
        _reused.address = -(-ctypes.addressof(_reused.buffer) // LINE) * LINE
    address: int = _reused.address
    return address


def weight_of(compressed: Compressed) -> Any:
    """The structure of a weight; its tensors must outlive the call."""
    values, bitmask, row_offsets, n = compressed
    pointers = (values.data_ptr(), bitmask.data_ptr(), row_offsets.data_ptr())
    return Weight(*pointers, values.numel(), row_offsets.numel() - 1, n)


def part_of(
    rows: slice, columns: slice, other: Tensor | None = None, starts: Tensor | None = None, ends: Tensor | None = None
) -> Any:
    """The structure of a part, next to a matrix whose rows are as far apart as those of `other`."""
    return Part(
        rows.start,
        rows.stop - rows.start,
        columns.start,
        columns.stop - columns.start,
        0 if other is None else other.stride(0),
        None if starts is None else starts.data_ptr(),
        None if ends is None else ends.data_ptr(),
        torch.get_num_threads(),
    )


@cache
def function_of(name: str, *dtypes: torch.dtype) -> Any:
    """A function of the tier that runs here, for dtypes."""
    return getattr(_library(), f"bitmask_{name}_{tier()}_{'_'.join(NAMES[dtype] for dtype in dtypes)}")


def gradient_parts(part: Any) -> int:
    """How many parts of the gradient of B a part of the weight has."""
    parts: int = getattr(_library(), f"bitmask_gradient_{tier()}_parts")(ctypes.byref(part))
    return parts


@cache
def prompt_bytes(columns: int) -> int:
    """How much room each thread needs for the rows of W' that it multiplies a prompt by."""
    size: int = _library().bitmask_prompt_bytes(ctypes.c_int64(columns))
    return size


def pointer_to(tensor: Tensor) -> ctypes.c_void_p:
    """The address of a tensor's first element."""
    return ctypes.c_void_p(tensor.data_ptr())


def _library() -> ctypes.CDLL:
    library = load_library("bitmask")
    assert library is not None, "supports() is asked first"
    return library
