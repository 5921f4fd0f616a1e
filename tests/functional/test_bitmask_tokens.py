# SPDX-License-Identifier: Apache-2.0
"""Few tokens straight from the compressed weight, against the formula in float64."""

import pytest
import torch
from bitmask_cases import BOUNDS, DTYPES, MASKS, SHAPES, compiled_only, make_factors, make_weight
from torch.utils._python_dispatch import TorchDispatchMode

from peft_spp.functional.compressed import compressed_linear
from peft_spp.functional.factors import Factors
from peft_spp.functional.kernels.cpu import bitmask
from peft_spp.functional.kernels.cpu.backend import cpu
from peft_spp.functional.kernels.scaled import ScaledWeight

from helpers import reference
from helpers.factored import relative_error


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def magnitude(x, weight, bias, factors):
    positive = [Factors(A.abs(), B.abs(), s) for A, B, s in factors]
    return reference.linear(x.abs(), weight.abs(), None if bias is None else bias.abs(), positive)


@compiled_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, bitmask.MOST_TOKENS])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_few_tokens_are_within_the_rounding_of_the_formula(m, n, tokens, dtype):
    weight = make_weight(m, n, dtype)
    compressed, x, bias = bitmask.compress(weight), torch.randn(tokens, n).to(dtype), torch.randn(m).to(dtype)
    lines = torch.full((tokens, n + 3), float("nan"), dtype=dtype)[:, 2 : n + 2].copy_(x)
    for ranks, identity in (([], True), ([5], True), ([5], False), ([5, 3], True), ([3, 5, 1], False)):
        factors = make_factors(m, n, ranks)
        for own_bias in (bias, None):
            y = bitmask.few_tokens(lines, compressed, own_bias, factors, identity, dtype)
            assert y.dtype == dtype and y.shape == (tokens, m)
            expected = reference.linear(x, weight, own_bias, factors, identity)
            # the result is rounded, and A times x before it
            assert ((y - expected).abs() <= BOUNDS[dtype] * magnitude(x, weight, own_bias, factors)).all()
            # where there are many long sums, they do not cancel as a whole
            assert m < 100 or relative_error(y, expected) < BOUNDS[dtype]


@compiled_only
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_tokens_for_any_zeros(mask, dtype):
    weight = make_weight(67, 190, dtype, mask)
    x, factors = torch.randn(2, 190).to(dtype), make_factors(67, 190, [7])
    y = bitmask.few_tokens(x.t().contiguous().t(), bitmask.compress(weight), None, factors, True, dtype)
    assert relative_error(y, reference.linear(x, weight, None, factors)) < BOUNDS[dtype]


def test_few_tokens_are_left_to_others_where_there_is_no_kernel():
    weight = make_weight(8, 70, torch.float32)
    compressed, (factors,) = bitmask.compress(weight), make_factors(8, 70, [2])
    double = Factors(factors.A.double(), factors.B, 1.0)
    for tokens, own, dtype in (
        (bitmask.MOST_TOKENS + 1, factors, torch.float32),
        (1, factors, torch.bfloat16),
        (1, double, torch.float32),
    ):
        assert bitmask.few_tokens(torch.randn(tokens, 70), compressed, None, [own], True, dtype) is None


def test_tokens_and_a_bias_that_do_not_fit_are_refused():
    compressed, factors = bitmask.compress(make_weight(6, 70, torch.float32)), make_factors(6, 70, [2])
    for x, bias in ((torch.randn(1, 69), None), (torch.randn(1, 70), torch.randn(5))):
        with pytest.raises(ValueError, match="do not fit"):
            bitmask.few_tokens(x, compressed, bias, factors, True, torch.float32)
    with pytest.raises(ValueError, match="identity must be True"):
        bitmask.few_tokens(torch.randn(1, 70), compressed, None, [], False, torch.float32)


@compiled_only
def test_no_tokens_are_no_rows():
    compressed = bitmask.compress(make_weight(6, 70, torch.float32))
    assert bitmask.few_tokens(torch.empty(0, 70), compressed, None, [], True, torch.float32).shape == (0, 6)


@compiled_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 8, 9, 29, 48, 97, 200])
def test_tokens_in_groups_and_all_at_once_agree(tokens, dtype, monkeypatch):
    weight = make_weight(65, 130, dtype)
    compressed, bias = bitmask.compress(weight), torch.randn(65).to(dtype)
    x = torch.randn(2, tokens, 130).to(dtype)[:1]
    w = ScaledWeight(compressed, [], True, dtype)
    made = cpu.linear(x, w, bias)
    assert made.shape == (1, tokens, 65) and made.dtype == dtype
    if tokens:
        assert relative_error(made, reference.linear(x, weight, bias, [])) < 2 * BOUNDS[dtype]
    calls = []
    few_tokens = bitmask.few_tokens
    monkeypatch.setattr(bitmask, "few_tokens", lambda x, **rest: calls.append(len(x)) or few_tokens(x, **rest))
    cpu.linear(x, w, bias)
    stored = len(compressed.values) / weight.numel()
    most = 48 if dtype == torch.float32 else 24
    if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        most = 0
    by_values = 0 < tokens <= 8 or 0 < tokens * stored <= most
    assert calls == ([8] * (tokens // 8) + [tokens % 8] * (tokens % 8 > 0) if by_values else [])


class SeenOperators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(str(operator))
        return operator(*args, **(kwargs or {}))


@compiled_only
@pytest.mark.parametrize("adapters", [0, 2])
@pytest.mark.parametrize("tokens", [1, 9, 70])
def test_calls_past_the_dispatcher_give_the_operators_bits(tokens, adapters, monkeypatch):
    weight = make_weight(65, 130, torch.bfloat16)
    compressed, x = bitmask.compress(weight), torch.randn(2, tokens, 130).bfloat16()
    factors = make_factors(65, 130, [5, 13][:adapters])
    direct = compressed_linear(x, compressed, None, factors)
    with SeenOperators() as seen:
        watched = compressed_linear(x, compressed, None, factors)
    assert "peft_spp.compressed_linear.default" in seen.names
    assert torch.equal(direct, watched)
    # the other way around: with nobody to see it, the operator is not called
    monkeypatch.setattr(torch.ops.peft_spp, "compressed_linear", None)
    assert torch.equal(direct, compressed_linear(x, compressed, None, factors))


@compiled_only
def test_a_profiler_and_a_trace_see_the_operator():
    compressed, x = bitmask.compress(make_weight(65, 130, torch.bfloat16)), torch.randn(3, 130).bfloat16()
    with torch.profiler.profile() as profile:
        compressed_linear(x, compressed)
    assert any("compressed_linear" in event.name for event in profile.events())
    traced = torch.jit.trace(lambda x: compressed_linear(x, compressed), x)
    assert "peft_spp::compressed_linear" in str(traced.graph)
    other = torch.randn(3, 130).bfloat16()
    assert torch.equal(traced(other), compressed_linear(other, compressed))


@compiled_only
@pytest.mark.parametrize("tokens", [1, 9, 70])
def test_outputs_can_be_changed_in_place_while_gradients_are_recorded(tokens):
    """As those of `nn.Linear`: some adapters and models add to them."""
    compressed = bitmask.compress(make_weight(65, 130, torch.float32))
    x = torch.randn(2, tokens, 130, requires_grad=True)
    y = compressed_linear(x, compressed)
    y += 1.0
    y.sum().backward()
    expected = bitmask.expand(compressed).sum(0).expand(2, tokens, -1)
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-4)
