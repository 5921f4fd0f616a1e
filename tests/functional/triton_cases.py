# SPDX-License-Identifier: Apache-2.0
"""
What the Triton kernels compute. `test_triton` runs these tests in a process of their own: on a GPU if there is one,
otherwise in Triton's interpreter, which must be chosen before Triton is imported for the first time.
"""

import itertools

import pytest
import torch

from peft_spp.functional import Factors
from peft_spp.functional.kernels import stack
from peft_spp.functional.kernels.scaled import ScaledWeight
from peft_spp.functional.kernels.triton import triton

from helpers import reference


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]

# (rows m, columns n, ranks)
SMALL = [(16, 12, [4]), (17, 9, [5]), (7, 6, [1]), (6, 5, [6]), (1, 4, [1]), (5, 1, [2]), (24, 10, [5, 9, 1])]
# more than one tile each way; row blocks that end with tiles, within tiles, and several of them in a tile
LARGE = [(256, 300, [4]), (300, 130, [7]), (130, 70, [40]), (513, 70, [2, 3]), (3, 600, [2]), (600, 3, [16])]

LAYOUTS = {
    "contiguous": lambda m, n: torch.randn(m, n),
    "transposed": lambda m, n: torch.randn(n, m).t(),
    "columns of a wider one": lambda m, n: torch.randn(m, n + 7)[:, 3 : n + 3],
    "every other column": lambda m, n: torch.randn(m, 2 * n)[:, 1::2],
    "rows of a transposed one": lambda m, n: torch.randn(n, 3 * m).t()[m : 2 * m],
}


# Transformers' Conv1D transposes; the other layouts walk the same way as one of these
CASES = [(*shape, layout) for shape in SMALL + LARGE for layout in ("contiguous", "transposed")]
CASES += [(*shape, layout) for shape in (SMALL[1], LARGE[2]) for layout in list(LAYOUTS)[2:]]
LAYOUT_CASES = pytest.mark.parametrize(("m", "n", "ranks", "layout"), CASES)


def make_weight(m, n, dtype=torch.float32, layout="contiguous", seed=0):
    torch.manual_seed(seed)
    weight = LAYOUTS[layout](m, n)
    weight[torch.rand(m, n) < 0.5] = 0.0
    return weight.to(DEVICE, dtype)


def make_factors(m, n, ranks, dtype=torch.float32, seed=1):
    torch.manual_seed(seed)
    # no power of two: 1/3 is rounded in every dtype
    return [
        Factors(torch.randn(r, n).to(DEVICE, dtype), torch.randn(m, 1).to(DEVICE, dtype), 1 / 3 + i)
        for i, r in enumerate(ranks)
    ]


def unit(dtype):
    """The relative error of rounding to a dtype."""
    # Triton's interpreter truncates to bfloat16, where a GPU rounds to nearest
    return torch.finfo(dtype).eps / (1 if dtype == torch.bfloat16 and DEVICE == "cpu" else 2)


def accumulator(*dtypes):
    return torch.float64 if torch.float64 in dtypes else torch.float32


def assert_rounded(actual, expected, magnitude, acc, operations):
    """
    Check every element: one rounding to its dtype, and `operations` of the accumulator, of terms of that magnitude.
    """
    # a thousandth more: a float64 may become a bfloat16 by way of float32
    rounding = 1.001 * unit(actual.dtype) * (expected.abs() + torch.finfo(actual.dtype).tiny)
    excess = (actual.double().cpu() - expected).abs() - rounding - operations * unit(acc) * magnitude
    assert (excess <= 0).all(), f"{excess.max().item()} above the bound"


def assert_scaled(out, weight, factors, identity):
    weight, factors = weight.cpu(), [Factors(A.cpu(), B.cpu(), s) for A, B, s in factors]
    expected = reference.effective_weight(weight, factors, identity)
    magnitude = reference.effective_weight(weight.abs(), [Factors(A.abs(), B.abs(), s) for A, B, s in factors])
    acc = accumulator(weight.dtype, *(f.A.dtype for f in factors))
    assert_rounded(out, expected, magnitude, acc, 3 + 2 * len(factors))


def gradients_reference(product, weight, factors):
    """The chain rule of the reference for an input of which gyᵀ x is the product: y = x W', gy = 1, x = product."""
    product, weight = product.double().cpu(), weight.double().cpu()
    factors = [Factors(A.double().cpu(), B.double().cpu(), s) for A, B, s in factors]
    grads = reference.gradients(product, weight, factors, torch.eye(len(weight), dtype=torch.double))
    return list(zip(grads["A"], grads["B"], strict=True))


def assert_gradients(grads, product, weight, factors):
    expected = gradients_reference(product, weight, factors)
    positive = [Factors(A.abs(), B.abs(), s) for A, B, s in factors]
    magnitudes = gradients_reference(product.abs(), weight.abs(), positive)
    acc = accumulator(product.dtype, weight.dtype, *(f.A.dtype for f in factors))
    for f, pair, values, sizes in zip(factors, grads, expected, magnitudes, strict=True):
        for parameter, grad, value, size in zip(f[:2], pair, values, sizes, strict=True):
            assert grad.shape == parameter.shape and grad.dtype == parameter.dtype
            # additions in a tree: their errors grow with its depth
            assert_rounded(grad, value, size, acc, 24)


@pytest.mark.parametrize("ranks", [[4], [7, 3]])
@pytest.mark.parametrize("identity", [True, False])
def test_the_scaled_weight_may_be_written_over_the_weight(ranks, identity):
    weight, factors = make_weight(130, 70), make_factors(130, 70, ranks)
    expected = triton.scaled_weight(ScaledWeight(weight, factors, identity, weight.dtype))
    result = triton.scaled_weight(ScaledWeight(weight, factors, identity, weight.dtype), weight)
    assert result is weight and torch.equal(weight, expected)


@LAYOUT_CASES
def test_the_weight_is_the_formula_and_laid_out_as_the_base_is(m, n, ranks, layout):
    weight, factors = make_weight(m, n, layout=layout), make_factors(m, n, ranks)
    out = triton.scaled_weight(ScaledWeight(weight, factors, True, torch.float32))
    assert_scaled(out, weight, factors, True)
    assert out.stride() == torch.empty_like(weight).stride()


@pytest.mark.parametrize(("m", "n", "ranks"), [*SMALL, LARGE[1]])
def test_without_the_identity_the_weight_is_the_update(m, n, ranks):
    weight, factors = make_weight(m, n), make_factors(m, n, ranks)
    out = triton.scaled_weight(ScaledWeight(weight, factors, False, torch.float32))
    assert_scaled(out, weight, factors, False)


@LAYOUT_CASES
def test_the_gradients_are_the_chain_rule(m, n, ranks, layout):
    weight, factors = make_weight(m, n, layout=layout), make_factors(m, n, ranks)
    product = torch.randn_like(weight)
    assert_gradients(triton.factor_gradients(product, weight, factors), product, weight, factors)


@pytest.mark.parametrize(("weight_dtype", "factor_dtype", "dtype"), itertools.product(DTYPES, repeat=3), ids=str)
def test_the_weight_is_rounded_once(weight_dtype, factor_dtype, dtype):
    weight, factors = make_weight(20, 24, weight_dtype), make_factors(20, 24, [3], factor_dtype)
    out = triton.scaled_weight(ScaledWeight(weight, factors, True, dtype))
    assert out.dtype == dtype
    assert_scaled(out, weight, factors, True)


@pytest.mark.parametrize(
    ("product_dtype", "weight_dtype", "factor_dtype"), itertools.product(DTYPES, repeat=3), ids=str
)
def test_the_gradients_are_rounded_once(product_dtype, weight_dtype, factor_dtype):
    weight, factors = make_weight(20, 24, weight_dtype), make_factors(20, 24, [3], factor_dtype)
    product = torch.randn_like(weight).to(product_dtype)
    assert_gradients(triton.factor_gradients(product, weight, factors), product, weight, factors)


def test_a_product_in_another_layout_than_the_weight():
    weight, factors = make_weight(70, 90, layout="transposed"), make_factors(70, 90, [3])
    product = torch.randn(70, 90, device=DEVICE)
    assert_gradients(triton.factor_gradients(product, weight, factors), product, weight, factors)


def test_factors_of_any_layout_and_of_different_dtypes():
    weight = make_weight(20, 30)
    factors = [
        Factors(torch.randn(30, 4, device=DEVICE).t(), torch.randn(20, 2, device=DEVICE)[:, :1], 2.0),
        *make_factors(20, 30, [3], torch.bfloat16),
    ]
    out = triton.scaled_weight(ScaledWeight(weight, factors, True, torch.float32))
    assert_scaled(out, weight, factors, True)
    assert_gradients(triton.factor_gradients(weight, weight, factors), weight, weight, factors)


@pytest.mark.parametrize("identity", [True, False])
def test_a_zero_weight_gives_zero_even_where_the_factor_overflows(identity):
    weight = make_weight(20, 30)
    factors = [Factors(torch.full((4, 30), 3e38, device=DEVICE), torch.full((20, 1), -3e38, device=DEVICE), 2.0)]
    out = triton.scaled_weight(ScaledWeight(weight, factors, identity, torch.float32))
    assert (out[weight == 0] == 0).all()
    assert out[weight != 0].isinf().all()


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_what_is_not_finite_stays_in_its_row_block(layout):
    weight, factors = make_weight(90, 20, layout=layout), make_factors(90, 20, [9])
    weight[weight == 0] = 1.0
    product = torch.randn_like(weight)
    factors[0].A[4] = torch.inf
    product[60, 3] = torch.nan
    rows = torch.arange(90, device=DEVICE)

    out = triton.scaled_weight(ScaledWeight(weight, factors, True, torch.float32))
    assert torch.equal(~out.isfinite().all(dim=1), rows // 10 == 4)

    ((grad_A, grad_B),) = triton.factor_gradients(product, weight, factors)
    assert grad_A.isnan().nonzero().tolist() == [[6, 3]]
    assert torch.equal(~grad_B[:, 0].isfinite(), (rows // 10 == 4) | (rows == 60))


def test_the_gradients_are_the_same_bits_every_time():
    weight, factors = make_weight(300, 200, torch.bfloat16), make_factors(300, 200, [7, 3])
    product = torch.randn_like(weight)
    first, second = (triton.factor_gradients(product, weight, factors) for _ in range(2))
    for a, b in zip(itertools.chain(*first), itertools.chain(*second), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("m", "transposed"), [(24, False), (26, False), (24, True)])
def test_a_stack_of_weights_is_that_of_its_layers(m, transposed):
    layers, n, r = 3, 20, 4
    weight = make_weight(layers * m, n).view(layers, m, n)
    weight = weight.transpose(1, 2).contiguous().transpose(1, 2) if transposed else weight
    product, factors = torch.randn(layers, m, n, device=DEVICE), make_factors(layers * m, n, [layers * r])
    out = stack.scaled_weight(triton, weight, factors, True, torch.float32)
    assert out.stride() == weight.stride()
    grads = stack.factor_gradients(triton, product, weight, factors)
    for e in range(layers):
        one = [Factors(A.chunk(layers)[e], B.chunk(layers)[e], s) for A, B, s in factors]
        assert_scaled(out[e], weight[e], one, True)
        assert_gradients([[grad.chunk(layers)[e] for grad in grads]], product[e], weight[e], one)
