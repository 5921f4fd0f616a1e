# SPDX-License-Identifier: Apache-2.0
"""The nearest single adapter, against a dense singular value decomposition of each row block."""

import pytest
import torch

from peft_spp.functional import Factors
from peft_spp.functional.combine import rank_one_blocks

from helpers.reference import block_sizes, effective_weight


def draw(ranks, m, n, dtype=torch.float64):
    torch.manual_seed(sum(ranks) + m)
    return [
        Factors(torch.randn(r, n, dtype=dtype), torch.randn(m, 1, dtype=dtype), scaling)
        for r, scaling in zip(ranks, (2.0, -0.7, 0.3), strict=False)
    ]


def dense(factors, m, n):
    return effective_weight(torch.ones(m, n), factors, identity=False)


def dense_best(total, r):
    """The best rank-one approximation of each block, and its relative error."""
    best, row = torch.zeros_like(total), 0
    for size in block_sizes(total.shape[0], r):
        U, S, Vh = torch.linalg.svd(total[row : row + size], full_matrices=False)
        best[row : row + size] = S[0] * torch.outer(U[:, 0], Vh[0])
        row += size
    return best, ((total - best).norm() / total.norm()).item()


@pytest.mark.parametrize(
    ("ranks", "r", "m", "n"),
    [
        ((4, 4), 4, 16, 10),
        ((4, 4, 4), 4, 18, 7),
        ((3, 5), 4, 17, 9),
        ((2, 7, 3), 5, 23, 4),
        ((6, 2), 1, 12, 30),
        ((5, 4), 13, 13, 8),
    ],
)
def test_it_is_the_best_of_each_block(ranks, r, m, n):
    factors = draw(ranks, m, n)
    total = dense(factors, m, n)
    expected, error = dense_best(total, r)
    combined = rank_one_blocks(factors, r)
    assert combined.A.shape == (r, n) and combined.B.shape == (m, 1)
    torch.testing.assert_close(dense([Factors(combined.A, combined.B, 1.0)], m, n), expected, atol=1e-10, rtol=0)
    assert combined.relative_error == pytest.approx(error, abs=1e-10)


def test_one_adapter_is_reproduced():
    factors = draw((4,), 15, 8)
    combined = rank_one_blocks(factors, 4)
    assert combined.relative_error < 1e-14
    torch.testing.assert_close(dense([Factors(*combined[:2], 1.0)], 15, 8), dense(factors, 15, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_of_lower_precision_are_combined_in_float64(dtype):
    factors = draw((3, 5), 17, 9, dtype)
    combined = rank_one_blocks(factors, 4)
    in_float64 = rank_one_blocks([Factors(A.double(), B.double(), s) for A, B, s in factors], 4)
    assert torch.equal(combined.A, in_float64.A) and torch.equal(combined.B, in_float64.B)
    assert (combined.A.dtype, combined.B.dtype) == (torch.float64, torch.float64)


def test_adapters_that_differ_in_one_factor_only_have_an_exact_sum():
    (first,) = draw((4,), 16, 8)
    other = Factors(first.A, torch.randn_like(first.B), 1.5)
    assert rank_one_blocks([first, other], 4).relative_error < 1e-14


def test_one_block_a_row_is_exact():
    assert rank_one_blocks(draw((3, 4), 12, 8), 12).relative_error < 1e-14


def test_more_blocks_come_closer():
    factors = draw((2, 4), 32, 8)
    errors = [rank_one_blocks(factors, r).relative_error for r in (4, 8, 16, 32)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.1


@pytest.mark.parametrize(("ranks", "r", "m"), [((4, 2), 4, 8), ((3, 5), 4, 17)])
def test_the_layers_of_a_stack_are_combined_each_on_its_own(ranks, r, m):
    like = draw(ranks, m, 6)
    layers = [[Factors(torch.randn_like(A), torch.randn_like(B), s) for A, B, s in like] for _ in range(3)]
    stack = [
        Factors(torch.cat([one.A for one in parts]), torch.cat([one.B for one in parts]), parts[0].scaling)
        for parts in zip(*layers, strict=True)
    ]
    combined = rank_one_blocks(stack, r, layers=3)
    totals = [dense(factors, m, 6) for factors in layers]
    best = torch.cat([dense_best(total, r)[0] for total in totals])
    parts = zip(combined.A.chunk(3), combined.B.chunk(3), strict=True)
    found = torch.cat([dense([Factors(A, B, 1.0)], m, 6) for A, B in parts])
    torch.testing.assert_close(found, best, atol=1e-10, rtol=0)
    total = torch.cat(totals)
    assert combined.relative_error == pytest.approx(((total - best).norm() / total.norm()).item(), abs=1e-10)


@pytest.mark.parametrize("zero", ["A", "B"])
def test_a_sum_of_nothing_is_nothing(zero):
    (first,) = draw((4,), 16, 8)
    nothing = first._replace(**{zero: torch.zeros_like(getattr(first, zero))})
    combined = rank_one_blocks([nothing, nothing], 4)
    assert combined.relative_error == 0.0
    assert dense([Factors(*combined[:2], 1.0)], 16, 8).abs().max() == 0


def test_factors_of_different_weights_are_refused():
    with pytest.raises(ValueError, match="shapes"):
        rank_one_blocks([*draw((4,), 16, 8), *draw((4,), 16, 9)], 4)
    with pytest.raises(ValueError, match="r=17"):
        rank_one_blocks(draw((4,), 16, 8), 17)
    with pytest.raises(ValueError, match="3 layers"):
        rank_one_blocks(draw((3,), 16, 8), 1, layers=3)
    with pytest.raises(ValueError, match="r=9"):
        rank_one_blocks(draw((4,), 16, 8), 9, layers=2)
