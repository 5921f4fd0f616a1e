# SPDX-License-Identifier: Apache-2.0
"""The compiled elementwise work: the same bits of W' as PyTorch's operations, gradients within float32's rounding."""

import os
import subprocess
import sys

import pytest
import torch

from peft_spp.functional.factors import Factors
from peft_spp.functional.kernels.cpu.backend import cpu
from peft_spp.functional.kernels.cpu.native import NativeElementwise
from peft_spp.functional.kernels.cpu.tiled import TiledElementwise
from peft_spp.functional.kernels.scaled import ScaledWeight
from peft_spp.native import library


pytestmark = pytest.mark.skipif(library.load_library() is None, reason="no C++ compiler that works with this PyTorch")

SHAPES = [
    (64, 48, [16]),
    (61, 33, [5]),
    (700, 1300, [16, 7]),
    (130, 515, [130]),
    (1, 9, [1]),
    (300, 1, [1, 300, 4]),
    # whole strips and groups: nothing is left for the last one
    (512, 1024, [5, 3]),
    (40, 2048, [16]),
]
DTYPES = [torch.float32, torch.bfloat16]


def elements(m, n, ranks, dtype, transposed, factor_dtype=torch.float32):
    weight = torch.randn(m, n).masked_fill(torch.rand(m, n) < 0.5, 0.0).to(dtype)
    if transposed:
        weight = weight.t().contiguous().t()
    return weight, [
        Factors(torch.randn(r, n).to(factor_dtype), torch.randn(m, 1).to(factor_dtype), 2.0 / (i + 1))
        for i, r in enumerate(ranks)
    ]


def regions(m, n):
    yield slice(0, m), slice(0, n)
    yield slice(m // 3, max(m // 3 + 1, m - m // 4)), slice(n // 5, max(n // 5 + 1, n - n // 3))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("other_dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "ranks"), SHAPES)
def test_both_ways_agree(m, n, ranks, weight_dtype, other_dtype, transposed):
    weight, factors = elements(m, n, ranks, weight_dtype, transposed)
    assert NativeElementwise.supports(weight, factors, other_dtype)
    native, tiled = NativeElementwise(weight, factors), TiledElementwise(weight, factors)
    magnitudes = TiledElementwise(weight.abs(), [Factors(A.abs(), B.abs(), s) for A, B, s in factors])
    for rows, columns in regions(m, n):
        shape = rows.stop - rows.start, columns.stop - columns.start
        for identity in (True, False):
            outs = [work.buffer("out", *shape, other_dtype).fill_(float("nan")) for work in (native, tiled)]
            native.write_scaled(outs[0], rows, columns, identity)
            tiled.write_scaled(outs[1], rows, columns, identity)
            assert torch.equal(outs[0], outs[1])
            assert not torch.signbit(outs[0][weight[rows, columns] == 0]).any() or not identity
        product = native.buffer("product", *shape, other_dtype).copy_(torch.randn(shape))
        native.add_factor_gradients(product, rows, columns)
        tiled.add_factor_gradients(product, rows, columns)
        magnitudes.add_factor_gradients(product.abs(), rows, columns)
    gradients = (work.factor_gradients() for work in (native, tiled, magnitudes))
    for a, b, magnitude in zip(*gradients, strict=True):
        assert ((a - b).abs() <= 1e-6 * magnitude).all()


def block_sums(matrix, r):
    return torch.stack([block.sum(0) for block in matrix.tensor_split(r)])


class Guarded:
    """Puts tensors amid other memory: NaN, or where results are written a number that nothing else is."""

    MARGIN, MARK = 3000, 12345.0

    def __init__(self):
        self.written = []

    def _amid(self, tensor, around):
        memory = torch.full((tensor.numel() + 2 * self.MARGIN,), around, dtype=tensor.dtype)
        return memory, memory[self.MARGIN :].as_strided(tensor.shape, tensor.stride()).copy_(tensor)

    def read(self, tensor):
        return self._amid(tensor, float("nan"))[1]

    def write(self, tensor):
        memory, inner = self._amid(tensor, self.MARK)
        self.written.append((memory, memory[-1].clone()))
        return inner

    def assert_untouched(self):
        assert self.written
        for memory, mark in self.written:
            assert (memory[: self.MARGIN] == mark).all() and (memory[-self.MARGIN :] == mark).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "ranks"), SHAPES)
def test_no_memory_beside_the_tensors_is_used_or_written(m, n, ranks, dtype, transposed, monkeypatch):
    weight, factors = elements(m, n, ranks, dtype, transposed)
    guarded = Guarded()
    native = NativeElementwise(guarded.read(weight), factors)
    native.scaled_factors = [(guarded.read(A), guarded.read(B)) for A, B in native.scaled_factors]
    # the same in float64, with P(A) written out
    W, scaled_B = weight.double(), [factor.B.double() * factor[2] for factor in factors]
    lengths = [torch.tensor([len(part) for part in torch.arange(m).tensor_split(r)]) for r in ranks]
    expanded = [f.A.double().repeat_interleave(length, 0) for f, length in zip(factors, lengths, strict=True)]
    terms = [b * P for b, P in zip(scaled_B, expanded, strict=True)]
    magnitude = W.abs() * (1 + sum(term.abs() for term in terms))
    for rows, columns in regions(m, n):
        layout = native.buffer("layout", rows.stop - rows.start, columns.stop - columns.start, dtype).zero_()
        for identity in (True, False):
            out = guarded.write(layout)
            native.write_scaled(out, rows, columns, identity)
            difference = out - (W * (sum(terms) + identity))[rows, columns]
            assert (difference.abs() <= (1e-6 if dtype == torch.float32 else 4e-3) * magnitude[rows, columns]).all()
        product = guarded.read(layout.normal_())
        S = torch.zeros(m, n, dtype=torch.float64)
        S[rows, columns] = product.double() * W[rows, columns]
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", lambda *shape, of=torch.empty, **how: guarded.write(of(*shape, **how)))
            patch.setattr(torch, "zeros_like", lambda like, of=torch.zeros_like: guarded.write(of(like)))
            work = NativeElementwise(native.weight, factors)
            work.scaled_factors = native.scaled_factors
            work.add_factor_gradients(product, rows, columns)
        for (grad_A, grad_B), P, b, r in zip(work.gradients, expanded, scaled_B, ranks, strict=True):
            of_A, of_B = b * S, P * S
            assert ((grad_A - block_sums(of_A, r)).abs() <= 1e-6 * block_sums(of_A.abs(), r)).all()
            assert ((grad_B[:, 0] - of_B.sum(1)).abs() <= 1e-6 * of_B.abs().sum(1)).all()
    guarded.assert_untouched()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_used_where_it_can_be(dtype, transposed, monkeypatch):
    def refuse(*args):
        raise AssertionError("PyTorch's operations are used")

    monkeypatch.setattr(TiledElementwise, "write_scaled", refuse)
    monkeypatch.setattr(TiledElementwise, "add_factor_gradients", refuse)
    weight, factors = elements(64, 48, [16], dtype, transposed)
    x, grad_y = torch.randn(200, 48).to(dtype), torch.randn(200, 64).to(dtype)
    cpu.scaled_weight(ScaledWeight(weight, factors, True, dtype))
    cpu.linear_by_weight(x, ScaledWeight(weight, factors, True, dtype), None)
    cpu.linear_backward(grad_y, x, ScaledWeight(weight, factors, True, dtype), True, True)
    cpu.factor_gradients(torch.zeros_like(weight), weight, factors)


def test_factors_of_any_layout_and_of_lower_precision_are_taken():
    weight, (factors,) = elements(96, 80, [8], torch.float32, False, torch.bfloat16)
    strided = Factors(factors.A.t().contiguous().t(), factors.B.repeat(1, 2)[:, :1], 2.0)
    whole = slice(0, 96), slice(0, 80)
    outs = [torch.empty(96, 80), torch.empty(96, 80)]
    NativeElementwise(weight, [strided]).write_scaled(outs[0], *whole, True)
    TiledElementwise(weight, [factors]).write_scaled(outs[1], *whole, True)
    assert torch.equal(*outs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_come_out_as_in_pytorch(dtype):
    weight, factors = elements(8, 6, [4], dtype, False)
    weight[0, 0], weight[1, 1] = float("inf"), float("nan")
    factors[0].A[2, 3], factors[0].B[5, 0] = float("nan"), float("-inf")
    outs = [torch.empty_like(weight) for _ in range(2)]
    for work, out in zip((NativeElementwise(weight, factors), TiledElementwise(weight, factors)), outs, strict=True):
        work.write_scaled(out, slice(0, 8), slice(0, 6), True)
    assert torch.equal(outs[0].nan_to_num(7.0), outs[1].nan_to_num(7.0))
    assert torch.equal(outs[0].isnan(), outs[1].isnan())


@pytest.mark.parametrize(
    ("weight", "factor_dtype", "dtype"),
    [
        (torch.randn(8, 6).double(), torch.float32, torch.float64),
        (torch.randn(8, 6), torch.float64, torch.float32),
        (torch.randn(8, 6).half(), torch.float32, torch.float16),
        (torch.randn(8, 6), torch.float32, torch.float16),
        (torch.randn(8, 12)[:, ::2], torch.float32, torch.float32),
        (torch.randn(8, 1).expand(8, 6), torch.float32, torch.float32),
    ],
)
def test_what_it_cannot_walk_is_left_to_pytorch(weight, factor_dtype, dtype):
    factors = [Factors(torch.randn(2, 6, dtype=factor_dtype), torch.randn(8, 1, dtype=factor_dtype), 1.0)]
    assert not NativeElementwise.supports(weight, factors, dtype)


SCRIPT = """
import logging, torch
logging.basicConfig()
from peft_spp.functional import scaled_weight
from peft_spp.functional.factors import Factors
from peft_spp.native.library import load_library
W, A, B = torch.ones(4, 3), torch.ones(2, 3), torch.ones(4, 1)
with torch.no_grad():
    assert torch.equal(scaled_weight(W, [Factors(A, B, 2.0)]), 3 * W)
print("native" if load_library() else "tiled")
"""


@pytest.mark.parametrize(
    ("environment", "kind", "warns"),
    [
        ({}, "native", False),
        ({"PEFT_SPP_NATIVE": "0"}, "tiled", False),
        ({"CXX": "no-such-compiler"}, "tiled", False),
        ({"CXX": "false"}, "tiled", True),
        ({"XDG_CACHE_HOME": "/dev/null"}, "tiled", True),
    ],
)
def test_without_a_compiler_everything_still_works(tmp_path, environment, kind, warns):
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == [kind]
    assert ("WARNING:peft_spp" in result.stderr) is warns
    kept = sorted(path.suffix for path in tmp_path.rglob("*") if path.is_file())
    assert kept == ([".so"] if kind == "native" else [])
