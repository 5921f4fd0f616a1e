# SPDX-License-Identifier: Apache-2.0
"""Few tokens straight from the compressed weight, against the formula in float64."""

import pytest
import torch
from bitmask_cases import BOUNDS, DTYPES, MASKS, SHAPES, compiled_only, make_factors, make_weight
from torch.utils._python_dispatch import TorchDispatchMode

from peft_spp.functional import spp_linear
from peft_spp.functional.bitmask import Compressed
from peft_spp.functional.compressed import compressed_linear
from peft_spp.functional.factors import Factors
from peft_spp.functional.kernels.cpu import bitmask, bitmask_tokens
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
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, bitmask_tokens.MOST_TOKENS])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_few_tokens_are_within_the_rounding_of_the_formula(m, n, tokens, dtype):
    weight = make_weight(m, n, dtype)
    compressed, x, bias = bitmask.compress(weight), torch.randn(tokens, n).to(dtype), torch.randn(m).to(dtype)
    lines = torch.full((tokens, n + 3), float("nan"), dtype=dtype)[:, 2 : n + 2].copy_(x)
    for ranks, identity in (([], True), ([5], True), ([5], False), ([5, 3], True), ([3, 5, 1], False)):
        factors = make_factors(m, n, ranks)
        for own_bias in (bias, None):
            y = bitmask_tokens.few_tokens(lines, compressed, own_bias, factors, identity, dtype)
            assert y.dtype == dtype and y.shape == (tokens, m)
            expected = reference.linear(x, weight, own_bias, factors, identity)
            # the result is rounded, and A times x before it
            assert ((y - expected).abs() <= BOUNDS[dtype] * magnitude(x, weight, own_bias, factors)).all()
            # where there are many long sums, they do not cancel as a whole
            assert m < 100 or relative_error(y, expected) < BOUNDS[dtype]


@compiled_only
@pytest.mark.parametrize("tokens", [1, 16, 40, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_tensor_that_is_only_marked_as_negated_is_multiplied_negated(dtype, tokens):
    weight = bitmask.compress(make_weight(64, 128, dtype))
    x, bias = torch._neg_view(torch.randn(tokens, 128).to(dtype)), torch._neg_view(torch.randn(64).to(dtype))
    if dtype != torch.bfloat16:  # as x comes to be in practice
        x = torch.complex(torch.randn(tokens, 128).to(dtype), x.clone()).conj().imag
    assert x.is_neg() and bias.is_neg()
    for ranks in ([], [4]):
        factors = make_factors(64, 128, ranks)
        marked = [Factors(torch._neg_view(-A), torch._neg_view(-B), s) for A, B, s in factors]
        expected = compressed_linear(x.resolve_neg(), weight, bias.resolve_neg(), factors)
        assert torch.equal(compressed_linear(x, weight, bias, marked), expected)


@compiled_only
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_tokens_for_any_zeros(mask, dtype):
    weight = make_weight(67, 190, dtype, mask)
    x, factors = torch.randn(2, 190).to(dtype), make_factors(67, 190, [7])
    y = bitmask_tokens.few_tokens(x.t().contiguous().t(), bitmask.compress(weight), None, factors, True, dtype)
    assert relative_error(y, reference.linear(x, weight, None, factors)) < BOUNDS[dtype]


def test_few_tokens_are_left_to_others_where_there_is_no_kernel():
    weight = make_weight(8, 70, torch.float32)
    compressed, (factors,) = bitmask.compress(weight), make_factors(8, 70, [2])
    double = Factors(factors.A.double(), factors.B, 1.0)
    for tokens, own, dtype in (
        (bitmask_tokens.MOST_TOKENS + 1, factors, torch.float32),
        (1, factors, torch.bfloat16),
        (1, double, torch.float32),
    ):
        assert bitmask_tokens.few_tokens(torch.randn(tokens, 70), compressed, None, [own], True, dtype) is None


def test_tokens_and_a_bias_that_do_not_fit_are_refused():
    compressed, factors = bitmask.compress(make_weight(6, 70, torch.float32)), make_factors(6, 70, [2])
    for x, bias in ((torch.randn(1, 69), None), (torch.randn(1, 70), torch.randn(5))):
        with pytest.raises(ValueError, match="do not fit"):
            bitmask_tokens.few_tokens(x, compressed, bias, factors, True, torch.float32)
    with pytest.raises(ValueError, match="identity must be True"):
        bitmask_tokens.few_tokens(torch.randn(1, 70), compressed, None, [], False, torch.float32)


@compiled_only
def test_no_tokens_are_no_rows():
    compressed = bitmask.compress(make_weight(6, 70, torch.float32))
    assert bitmask_tokens.few_tokens(torch.empty(0, 70), compressed, None, [], True, torch.float32).shape == (0, 6)


prompts_only = pytest.mark.skipif(
    not bitmask_tokens.supports_prompt(bitmask.compress(torch.ones(1, 1, dtype=torch.bfloat16)), [], torch.bfloat16),
    reason="needs a processor with AVX-512 BF16 and without AMX",
)


@prompts_only
@pytest.mark.parametrize("tokens", [1, 5, 6, 7, 13, 64])
@pytest.mark.parametrize(("m", "n"), [*SHAPES, (1, 17000), (37, 3000), (70, 33000), (3, 0)])
def test_prompts_are_within_the_rounding_of_the_formula(m, n, tokens):
    dtype = torch.bfloat16
    weight = make_weight(m, n, dtype)
    compressed, x, bias = bitmask.compress(weight), torch.randn(tokens, n).to(dtype), torch.randn(m).to(dtype)
    lines = torch.full((tokens, n + 3), float("nan"), dtype=dtype)[:, 2 : n + 2].copy_(x)
    for ranks, identity in (([], True), ([5], True), ([5], False), ([5, 3], True)):
        factors = make_factors(m, n, ranks)
        scaled = bitmask.BitmaskElementwise(compressed, factors)
        scaled.write_scaled(made := torch.empty(m, n, dtype=dtype), slice(0, m), slice(0, n), identity)
        for own_bias in (bias, None):
            y = bitmask_tokens.prompt(lines, compressed, own_bias, factors, identity)
            assert y.dtype == dtype and y.shape == (tokens, m)
            # W' has the bits that it has elsewhere; only sums and the result are rounded
            expected = reference.linear(x, made, own_bias, [])
            rounding = 2.0**-8 * expected.abs() + 2.0**-20 * magnitude(x, made, own_bias, [])
            assert ((y - expected).abs() <= rounding).all()


@prompts_only
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("n", [190, 192])
def test_prompts_for_any_zeros_of_any_layout_and_layer(n, mask):
    weights = torch.stack([make_weight(67, n, torch.bfloat16, mask, seed=seed) for seed in range(2)])
    stack = bitmask.compress(weights)
    x = torch.randn(20, n).bfloat16()
    for layer in range(2):
        offsets = stack.row_offsets[67 * layer : 67 * (layer + 1) + 1]
        compressed = Compressed(stack.values, stack.bitmask[layer], offsets, n)
        for given in (x, x.t().contiguous().t(), x.repeat(1, 2)[:, n:], x.repeat_interleave(2, 1)[:, ::2]):
            y = bitmask_tokens.prompt(given, compressed, None, [], True)
            assert torch.equal(y, bitmask_tokens.prompt(x, bitmask.compress(weights[layer]), None, [], True))
            assert (
                not y.numel()
                or relative_error(y, reference.linear(x, weights[layer], None, [])) < 8e-3
                or (mask == "all" and not y.any())
            )


@prompts_only
def test_a_prompt_with_what_is_not_finite_has_it_where_the_dense_product_has():
    weight = make_weight(40, 130, torch.bfloat16)
    weight[3, 5], weight[7, 129] = float("inf"), float("nan")
    x = torch.randn(20, 130).bfloat16()
    x[2, 64], x[4, 1] = float("nan"), float("inf")
    y = bitmask_tokens.prompt(x, bitmask.compress(weight), None, [], True)
    expected = torch.nn.functional.linear(x, weight)
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())


@prompts_only
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_change_a_prompt(threads):
    compressed, x = bitmask.compress(make_weight(203, 330, torch.bfloat16)), torch.randn(20, 330).bfloat16()
    factors = make_factors(203, 330, [3, 100])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        made = bitmask_tokens.prompt(x, compressed, None, factors, True)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(made, bitmask_tokens.prompt(x, compressed, None, factors, True))


@prompts_only
@pytest.mark.parametrize("ranks", [[], [5], [5, 3]])
def test_many_tokens_have_the_bits_of_the_dense_layer_and_fewer_are_prompts(ranks, monkeypatch):
    weight, factors = make_weight(96, 256, torch.bfloat16), make_factors(96, 256, ranks)
    compressed = bitmask.compress(weight)
    calls = []
    prompt = bitmask_tokens.prompt
    monkeypatch.setattr(bitmask_tokens, "prompt", lambda x, *rest: calls.append(len(x)) or prompt(x, *rest))
    for tokens in (4, 5, 16, 17, 511, 512):
        x = torch.randn(tokens, 256).bfloat16()
        y = cpu.linear(x, ScaledWeight(compressed, factors, True, torch.bfloat16), None)
        if tokens == 512:
            assert torch.equal(y, spp_linear(x, weight, None, factors))
    assert calls == ([5, 16] if ranks else []) + [17, 511]


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
    few_tokens = bitmask_tokens.few_tokens
    monkeypatch.setattr(bitmask_tokens, "few_tokens", lambda x, *rest: calls.append(len(x)) or few_tokens(x, *rest))
    cpu.linear(x, w, bias)
    stored = len(compressed.values) / weight.numel()
    most = 48 if dtype == torch.float32 else 24
    if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        most = 0
    by_values = 0 < tokens <= 8 or 0 < tokens * stored <= most
    if bitmask_tokens.supports_prompt(compressed, [], dtype):
        by_values = 0 < tokens <= 16
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
