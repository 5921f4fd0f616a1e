# SPDX-License-Identifier: Apache-2.0
"""A kernel for few tokens and dense weights, of the same make as those of compressed weights: `dense_tokens.cpp`."""

from __future__ import annotations

import ctypes
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from peft_spp.native import library


_SOURCE = Path(__file__).with_name("dense_tokens.cpp")
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
TOKENS = (1, 2, 4, 8)


@cache
def load(tier: str) -> ctypes.CDLL:
    """
    Compile the kernel, as the kernels of compressed weights are for a processor.

    Args:
        tier (`str`): As [`peft_spp.functional.kernels.cpu.bitmask.tier`] gives it, and not `"portable"`.
    """
    compiler = library._compiler()
    assert compiler is not None, "a tier is compiled"
    flags = (*library._FLAGS, *library._BITMASK_FLAGS[f"bitmask_{tier}.cpp"])
    with tempfile.TemporaryDirectory() as folder:
        return ctypes.CDLL(str(library.build(compiler, {_SOURCE: flags}, Path(folder) / "dense.so")))


def dense_tokens(x: Tensor, weight: Tensor, tier: str) -> Tensor:
    """
    `x @ weight.T` for 1, 2, 4 or 8 tokens.

    Args:
        x (`torch.Tensor`): float32 or bfloat16, shape `(tokens, n)` with n a multiple of 64, contiguous.
        weight (`torch.Tensor`): shape `(m, n)` with m a multiple of 4 times the threads, contiguous.
        tier (`str`): See [`load`].
    """
    (tokens, n), m = x.shape, len(weight)
    assert tokens in TOKENS and n % 64 == 0 and m % (4 * torch.get_num_threads()) == 0
    assert x.is_contiguous() and weight.is_contiguous() and x.dtype == weight.dtype
    y = torch.empty(tokens, m, dtype=x.dtype)
    sizes = ctypes.c_int64(m), ctypes.c_int64(n)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (weight, x, y)]
    function = getattr(load(tier), f"dense_{_NAMES[x.dtype]}")
    function(pointers[0], *sizes, pointers[1], ctypes.c_int64(tokens), pointers[2], torch.get_num_threads())
    return y
