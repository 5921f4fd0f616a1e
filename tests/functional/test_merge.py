# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_spp.functional import Factors, merged_weight, scaled_weight

from helpers import reference


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def is_positive_zero(t: torch.Tensor) -> torch.Tensor:
    return (t == 0) & ~t.signbit()


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize(("m", "n", "r"), [(16, 12, 4), (17, 9, 5), (6, 5, 6), (7, 3, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_weight_is_the_formula_rounded_once(dtype, m, n, r, fan_in_fan_out):
    torch.manual_seed(0)
    W = torch.randn(n, m).to(dtype).T if fan_in_fan_out else torch.randn(m, n).to(dtype)
    W = W.masked_fill(torch.rand(m, n) < 0.5, 0.0)
    factors = [Factors(torch.randn(r, n), torch.randn(m, 1), 0.7)]
    if dtype == torch.float64:
        factors = [Factors(factors[0].A.double(), factors[0].B.double(), 0.7)]
    merged = merged_weight(W, factors)
    assert merged.dtype == dtype and merged.stride() == W.stride()
    exact = reference.effective_weight(W, factors)
    eps = torch.finfo(dtype).eps
    # the rounding to the dtype, at most half a unit, and for float32 the few operations before it, where 1 + s·A·B may
    # cancel, so relative to |W| (1 + |s·A·B|)
    size = W.double().abs() * (1 + reference.effective_weight(torch.ones_like(W), factors, identity=False).abs())
    slack = 4 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    assert ((merged.double() - exact).abs() <= 0.5 * eps * exact.abs() + slack * size).all()


@given(
    seed=st.integers(0, 2**31),
    m=st.integers(1, 20),
    n=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    sparsity=st.sampled_from([0.0, 0.5, 0.75, 1.0]),
    poison=st.sampled_from([None, float("inf"), float("-inf"), float("nan")]),
    scale=st.sampled_from([1.0, 1e4, 1e-8]),
)
@settings(max_examples=150, deadline=None)
def test_pruned_places_stay_plus_zero_whatever_the_factors_are(seed, m, n, dtype, sparsity, poison, scale):
    torch.manual_seed(seed)
    W = torch.randn(m, n).to(dtype)
    mask = torch.rand(m, n) < sparsity
    W[mask] = 0.0
    W[mask & (torch.rand(m, n) < 0.5)] = -0.0
    r = int(torch.randint(1, m + 1, ()))
    A, B = torch.randn(r, n) * scale, torch.randn(m, 1) * scale
    if poison is not None:
        A[torch.rand(r, n) < 0.5] = poison
        B[torch.rand(m, 1) < 0.5] = poison
    merged = merged_weight(W, [Factors(A, B, -2.0)])
    assert is_positive_zero(merged[W == 0]).all()
    assert not (merged.signbit() & (merged == 0)).any()
    if poison is None and scale == 1.0:
        assert torch.isfinite(merged).all()


def test_a_product_that_underflows_is_plus_zero():
    W = torch.full((2, 2), -1e-30, dtype=torch.float32)
    merged = merged_weight(W, [Factors(torch.full((1, 2), -1.0), torch.tensor([[1.0], [1.0]]), 1.0 - 1e-7)])
    tiny = merged_weight(W.to(torch.bfloat16), [Factors(torch.full((1, 2), -1.0), torch.ones(2, 1), 1.0)])
    assert is_positive_zero(tiny).all()
    assert not (merged.signbit() & (merged == 0)).any()


def test_the_merged_weight_is_the_one_that_forward_uses():
    torch.manual_seed(0)
    W = torch.randn(32, 24).to(torch.bfloat16)
    W[torch.rand(32, 24) < 0.5] = 0.0
    factors = [Factors(torch.randn(5, 24), torch.randn(32, 1), 2.0)]
    with torch.no_grad():
        assert torch.equal(merged_weight(W, factors), scaled_weight(W, factors))


def test_the_base_weight_is_left_alone():
    W = torch.randn(6, 4)
    before = W.clone()
    merged_weight(W, [Factors(torch.randn(2, 4), torch.randn(6, 1), 1.0)])
    assert torch.equal(W, before)


def test_a_factor_that_overflows_only_once_it_is_scaled_reaches_no_pruned_place():
    W = torch.tensor([[0.0, 1.0]])
    merged = merged_weight(W, [Factors(torch.tensor([[0.0, 0.0]]), torch.tensor([[3e38]]), 10.0)])
    assert is_positive_zero(merged[0, 0])
    assert torch.isnan(merged[0, 1])


@pytest.mark.parametrize("identity", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_the_weight_is_the_same_with_gradients(identity, dtype):
    W = torch.randn(6, 4)
    factors = [Factors(torch.randn(2, 4), torch.randn(6, 1, requires_grad=True), 1.0)]
    differentiable = scaled_weight(W, factors, identity=identity, dtype=dtype)
    with torch.no_grad():
        plain = scaled_weight(W, factors, identity=identity, dtype=dtype)
    assert differentiable.requires_grad and differentiable.dtype == plain.dtype
    torch.testing.assert_close(differentiable.detach(), plain)
