# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels for compressed weights compute. `test_triton` runs these tests, too."""

import numpy as np
import pytest
import torch
from bitmask_cases import DTYPES, MASKS, bits_of, make_weight
from triton_cases import DEVICE, assert_scaled, make_factors, unit

from peft_spp.functional import Factors
from peft_spp.functional.bitmask import Compressed, compress, one_of_stack
from peft_spp.functional.kernels.scaled import ScaledWeight
from peft_spp.functional.kernels.triton import triton

from helpers import reference


# words that are whole and not, more than one tile of each kernel, more than one span of columns
SMALL = [(1, 1), (3, 63), (17, 64), (5, 130)]
LARGE = [(20, 1100), (33, 300), (2, 2100)]


def make_compressed(weight):
    """The compressed weight amid numbers that are not its own: a value read from elsewhere is seen."""
    values, bitmask, row_offsets, n = compress(weight)
    around = torch.full((len(values) + 14,), float("nan"), dtype=values.dtype)
    around[7 : len(values) + 7] = values
    inside = around.to(DEVICE)[7 : len(values) + 7]
    return Compressed(inside, bitmask.to(DEVICE), row_offsets.to(DEVICE), n)


def assert_linear(y, x, weight, factors, identity=True, bias=None):
    """W' is rounded once to the dtype of y, products and sums are float32, and y is rounded once."""
    x, factors = x.cpu(), [Factors(A.cpu(), B.cpu(), s) for A, B, s in factors]
    bias = None if bias is None else bias.cpu()
    expected = reference.linear(x, weight, bias, factors, identity)
    positive = [Factors(A.abs(), B.abs(), s) for A, B, s in factors]
    magnitude = reference.linear(x.abs(), weight.abs(), None if bias is None else bias.abs(), positive)
    inner = unit(y.dtype) if factors else 0.0
    operations = 6 + 2 * len(factors) + x.shape[-1]
    bound = 1.001 * unit(y.dtype) * expected.abs() + (1.01 * inner + operations * unit(torch.float32)) * magnitude
    assert y.shape == expected.shape
    assert ((y.double().cpu() - expected).abs() <= bound).all()


@pytest.fixture
def accesses(monkeypatch):
    """Checks that every element the interpreter reads or writes is inside a tensor, and counts them."""
    from triton.runtime import interpreter

    tensors, count = [], {"load": 0, "store": 0}
    convert = interpreter._implicit_cvt

    def noted(arg):
        if isinstance(arg, torch.Tensor):
            tensors.append((arg.data_ptr(), arg.data_ptr() + arg.nbytes))
        return convert(arg)

    def checked(name):
        access = getattr(interpreter._interpreter, name)

        def check(pointers, *rest):
            mask = rest[0] if name == "load" else rest[1]
            addresses = pointers[mask.astype(bool)].astype(np.int64)
            inside = np.zeros(len(addresses), dtype=bool)
            for start, stop in tensors:
                inside |= (addresses >= start) & (addresses < stop)
            assert inside.all(), f"{name} outside all tensors"
            count[name] += len(addresses)
            return access(pointers, *rest)

        return check

    monkeypatch.setattr(interpreter, "_implicit_cvt", noted)
    for name in count:
        monkeypatch.setattr(interpreter._interpreter, name, checked(name))
    return count


@pytest.mark.skipif(DEVICE != "cpu", reason="reads are seen in Triton's interpreter alone")
@pytest.mark.parametrize("ranks", [[], [5]])
@pytest.mark.parametrize("mask", ["rows", "none", "all", "few"])
def test_nothing_is_read_or_written_outside_the_tensors(accesses, mask, ranks):
    m, n, dtype = 21, 197, torch.float32
    w = ScaledWeight(make_compressed(make_weight(m, n, dtype, mask)), make_factors(m, n, ranks), True, dtype)
    triton.compressed_weight(w)
    assert accesses["store"] == m * n and accesses["load"] >= len(w.weight.values) + w.weight.bitmask.numel()
    for tokens, kind in ((1, dtype), (3, dtype), (3, torch.float16)):
        stored = accesses["store"]
        triton.compressed_linear(torch.ones(tokens, n, dtype=kind), w._replace(dtype=kind), torch.ones(m))
        assert accesses["store"] == stored + tokens * m


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expanding_gives_every_bit(mask, dtype):
    for m, n in SMALL:
        weight = make_weight(m, n, dtype, mask, special=True)
        out = triton.compressed_weight(ScaledWeight(make_compressed(weight), [], True, dtype))
        assert torch.equal(bits_of(out.cpu()), bits_of(weight))


@pytest.mark.parametrize(("m", "n"), LARGE)
def test_expanding_gives_every_bit_of_large_weights(m, n):
    weight = make_weight(m, n, torch.bfloat16, special=True)
    out = triton.compressed_weight(ScaledWeight(make_compressed(weight), [], True, torch.bfloat16))
    assert torch.equal(bits_of(out.cpu()), bits_of(weight))


@pytest.mark.parametrize("identity", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("ranks", [*(pytest.param(ranks, marks=pytest.mark.slow) for ranks in ([1], [4])), [7, 3, 1]])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_weight_is_the_formula(dtype, ranks, identity):
    for (m, n), mask in zip([(1, 1), (17, 64), (35, 130), (40, 300)], ["few", "rows", "random", "2:4"], strict=True):
        weight, factors = make_weight(m, n, dtype, mask), make_factors(m, n, [min(r, m) for r in ranks])
        out = triton.compressed_weight(ScaledWeight(make_compressed(weight), factors, identity, dtype))
        assert_scaled(out, weight, factors, identity)
        assert torch.equal(bits_of(out.cpu())[weight == 0], torch.zeros_like(bits_of(weight))[weight == 0])


@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_weight_is_rounded_once_to_any_dtype(dtype, factor_dtype):
    weight, factors = make_weight(20, 70, torch.bfloat16), make_factors(20, 70, [3], factor_dtype)
    out = triton.compressed_weight(ScaledWeight(make_compressed(weight), factors, True, dtype))
    assert out.dtype == dtype
    assert_scaled(out, weight, factors, True)
    plain = triton.compressed_weight(ScaledWeight(make_compressed(weight), [], True, dtype))
    assert plain.dtype == dtype and torch.equal(plain.cpu(), weight.to(dtype))


@pytest.mark.parametrize("ranks", [[], [5]])
def test_the_weight_is_written_where_it_is_wanted(ranks):
    weight, factors = make_weight(20, 70, torch.float32), make_factors(20, 70, ranks)
    w = ScaledWeight(make_compressed(weight), factors, True, torch.float32)
    expected = triton.compressed_weight(w)
    for out in (torch.empty(20, 70), torch.empty(70, 20).t(), torch.full((20, 140), 7.0)[:, ::2]):
        out = out.to(DEVICE) if out.is_contiguous() else out
        assert triton.compressed_weight(w, out) is out and torch.equal(out, expected)


@pytest.mark.parametrize("identity", [True, False])
def test_special_numbers_give_what_the_dense_kernel_gives(identity):
    weight = make_weight(20, 90, torch.float32, special=True)
    overflowing = Factors(torch.full((4, 90), 3e38, device=DEVICE), torch.full((20, 1), -3e38, device=DEVICE), 2.0)
    for factors in ([overflowing], make_factors(20, 90, [3]), [*make_factors(20, 90, [7]), overflowing]):
        w = ScaledWeight(make_compressed(weight), factors, identity, torch.float32)
        dense = triton.scaled_weight(w._replace(weight=weight.to(DEVICE)))
        out = triton.compressed_weight(w)
        assert torch.equal(out.isnan(), dense.isnan())
        assert torch.equal(bits_of(out.nan_to_num(5.0)), bits_of(dense.nan_to_num(5.0)))


@pytest.mark.parametrize("tokens", [1, 5, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 8, 9, 16, 17))])
@pytest.mark.parametrize("ranks", [[], pytest.param([4], marks=pytest.mark.slow), [7, 1]])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_tokens(dtype, ranks, tokens):
    for m, n, mask, with_bias in ((1, 1, "all", False), (9, 130, "rows", True), (17, 1030, "random", False)):
        weight, factors = make_weight(m, n, dtype, mask), make_factors(m, n, [min(r, m) for r in ranks])
        x = torch.randn(tokens, n).to(DEVICE, dtype)
        bias = torch.randn(m).to(DEVICE, dtype) if with_bias else None
        y = triton.compressed_linear(x, ScaledWeight(make_compressed(weight), factors, True, dtype), bias)
        assert y.dtype == dtype
        assert_linear(y, x, weight, factors, bias=bias)


@pytest.mark.parametrize("index", range(3))
def test_one_weight_of_a_stack(index):
    stack = torch.stack([make_weight(9, 130, torch.float32, mask) for mask in ("rows", "random", "all")])
    one, factors, x = one_of_stack(make_compressed(stack), index), make_factors(9, 130, [3]), torch.randn(2, 130)
    out = triton.compressed_weight(ScaledWeight(one, [], True, torch.float32))
    assert torch.equal(bits_of(out.cpu()), bits_of(stack[index]))
    for own in ([], factors):
        y = triton.compressed_linear(x.to(DEVICE), ScaledWeight(one, own, True, torch.float32), None)
        assert_linear(y, x, stack[index], own)


@pytest.mark.parametrize("tokens", [3, 20])
def test_the_update_alone(tokens):
    weight, factors = make_weight(10, 70, torch.float32), make_factors(10, 70, [3, 2])
    x = torch.randn(tokens, 70, device=DEVICE)
    y = triton.compressed_linear(x, ScaledWeight(make_compressed(weight), factors, False, torch.float32), None)
    assert_linear(y, x, weight, factors, identity=False)


@pytest.mark.parametrize("shape", [(2, 3, 70), (70,), (0, 70), (1, 20, 70)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_input_may_have_any_shape_layout_and_dtype(shape, dtype):
    weight, factors = make_weight(10, 70, torch.bfloat16), make_factors(10, 70, [3])
    x = torch.randn(*shape[:-1], 140).to(DEVICE)[..., ::2]
    w = ScaledWeight(make_compressed(weight), factors, True, dtype)
    y = triton.compressed_linear(x, w, None)
    assert y.shape == (*shape[:-1], 10) and y.dtype == dtype
    assert_linear(y.reshape(-1, 10), x.to(dtype).reshape(-1, 70), weight, factors)


@pytest.mark.parametrize("tokens", [4, 20])
def test_what_is_not_finite_stays_in_its_token(tokens):
    weight = make_weight(10, 70, torch.float32)
    x = torch.randn(tokens, 70, device=DEVICE)
    x[2, 5] = torch.inf
    y = triton.compressed_linear(x, ScaledWeight(make_compressed(weight), [], True, torch.float32), None)
    assert torch.equal(~y.cpu().isfinite().all(dim=1), torch.arange(tokens) == 2)
    # infinity times a zero is not a number, as in the product with the dense weight
    assert torch.equal(y[2].cpu().isnan(), weight[:, 5] == 0)


@pytest.mark.parametrize(("m", "n"), [(0, 70), (10, 0), (0, 0)])
def test_empty_weights(m, n):
    w = ScaledWeight(make_compressed(torch.zeros(m, n)), [], True, torch.float32)
    assert triton.compressed_weight(w).shape == (m, n)
    for tokens in (2, 20):
        y = triton.compressed_linear(torch.ones(tokens, n, device=DEVICE), w, torch.ones(m, device=DEVICE))
        assert torch.equal(y, torch.ones(tokens, m, device=DEVICE))


@pytest.mark.parametrize(("needs_x", "needs_factors"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("ranks", [[], [4], [7, 1]])
def test_the_gradients_are_those_of_the_dense_weight(ranks, needs_x, needs_factors):
    weight, factors = make_weight(20, 70, torch.float32), make_factors(20, 70, ranks)
    x, grad_y = torch.randn(9, 70, device=DEVICE), torch.randn(9, 20, device=DEVICE)
    needs_factors = needs_factors and bool(ranks)
    w = ScaledWeight(make_compressed(weight), factors, True, torch.float32)
    grads = triton.linear_backward(grad_y, x, w, needs_x, needs_factors)
    dense = w._replace(weight=weight.to(DEVICE))
    expected = triton.linear_backward(grad_y, x, dense, needs_x, needs_factors)
    assert len(grads) == needs_x + 2 * needs_factors * len(ranks)
    for grad, value in zip(grads, expected, strict=True):
        assert torch.equal(grad, value)
