# SPDX-License-Identifier: Apache-2.0
"""Weights with zeros in all the ways that they can have them, for the tests of compressed weights."""

import pytest
import torch
from hypothesis import strategies as st

from peft_spp.functional.bitmask import BITS
from peft_spp.functional.factors import Factors
from peft_spp.functional.kernels.cpu import bitmask


DTYPES = tuple(BITS)
# what is easily taken for +0.0, or changed on the way: -0.0, denormal numbers, infinities, NaN of any bits
SPECIAL = {
    torch.float32: [0x80000000, 1, 0x80000001, 0x007FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF],
    torch.bfloat16: [0x8000, 1, 0x8001, 0x007F, 0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF],
    torch.float16: [0x8000, 1, 0x8001, 0x03FF, 0x7C00, 0xFC00, 0x7E00, 0x7C01, 0xFFFF],
}
MASKS = ("random", "few", "none", "all", "rows", "2:4")


def bits_of(tensor):
    """The bits of floating numbers as integers: NaN of the same bits are equal, and zeros of other signs are not."""
    return tensor.contiguous().view(BITS[tensor.dtype])


def make_weight(m, n, dtype, mask="random", special=False, seed=0):
    """A weight whose stored places are `mask`; `special` puts every number of SPECIAL amid the others."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator).to(dtype)
    # no zero but those of the mask
    weight[weight == 0] = 1.0
    if special:
        width = 8 * dtype.itemsize
        numbers = [bits - (1 << width) if bits >> (width - 1) else bits for bits in SPECIAL[dtype]]
        chosen = torch.tensor(numbers, dtype=BITS[dtype]).view(dtype)
        index = torch.randint(len(chosen), (m, n), generator=generator)
        weight = torch.where(torch.rand(m, n, generator=generator) < 0.5, chosen[index], weight)
    share = {"random": 0.5, "few": 0.03, "none": 0.0, "all": 1.0, "rows": 0.5, "2:4": 1.0}[mask]
    stored = torch.rand(m, n, generator=generator) < share
    if mask == "rows":
        stored[::3], stored[1::3] = False, True
    if mask == "2:4":
        stored &= torch.arange(n) % 4 < 2
    return torch.where(stored, weight, torch.zeros((), dtype=dtype))


def with_strides(weight, layout):
    """The same weight, contiguous, transposed, or amid the columns or rows of a larger tensor."""
    m, n = weight.shape
    if layout == "transposed":
        return weight.t().contiguous().t()
    if layout == "lines apart":
        return torch.full((m, n + 5), 7.0, dtype=weight.dtype)[:, 2 : n + 2].copy_(weight)
    if layout == "every other":
        return torch.full((m, 2 * n), 7.0, dtype=weight.dtype)[:, ::2].copy_(weight)
    return weight


weights = st.builds(
    make_weight,
    st.integers(0, 40),
    st.one_of(st.integers(0, 200), st.sampled_from([64, 128, 63, 65, 127])),
    st.sampled_from(DTYPES),
    st.sampled_from(MASKS),
    st.booleans(),
    st.integers(0, 1000),
)
layouts = st.sampled_from(["contiguous", "transposed", "lines apart", "every other"])

COMPILED = bitmask.tier() is not None
compiled_only = pytest.mark.skipif(not COMPILED, reason="no C++ compiler that works with this PyTorch")

# whole words and not, rows with nothing behind them and with much, strips of 512 and of 2048 columns and beyond
SHAPES = [(1, 1), (3, 63), (64, 64), (61, 130), (130, 515), (9, 2500), (300, 576), (5, 4160)]
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def make_factors(m, n, ranks, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        Factors(torch.randn(min(r, m), n, generator=generator), torch.randn(m, 1, generator=generator), 2.0 / (i + 1))
        for i, r in enumerate(ranks)
    ]
