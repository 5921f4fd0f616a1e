# SPDX-License-Identifier: Apache-2.0
"""The bounds of docs/reliability.md, element by element, against the formula in float64."""

import pytest
import torch
import torch.nn.functional as F

from peft_spp.functional import Factors, merged_weight, scaled_weight, spp_linear
from peft_spp.functional.kernels import by_activation
from peft_spp.functional.kernels.composite import Composite, composite
from peft_spp.functional.kernels.cpu.backend import cpu
from peft_spp.functional.kernels.scaled import ScaledWeight

from helpers import reference
from helpers.factored import make


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(96, 80, [7]), (33, 200, [1]), (17, 9, [5, 3]), (64, 64, [16, 4, 64])]


def unit(dtype):
    """The relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def compute_unit(dtype):
    return unit(torch.float64 if dtype == torch.float64 else torch.float32)


def magnitudes(factors):
    return [Factors(A.abs(), B.abs(), abs(s)) for A, B, s in factors]


def terms(x, weight, bias, factors):
    """T: the sum of the magnitudes of all terms of an output."""
    return reference.linear(x.abs(), weight.abs(), None if bias is None else bias.abs(), magnitudes(factors))


def weight_bound(weight, factors, dtype):
    """What one rounding, and those of the few operations before it, can do to an element of W'."""
    exact = reference.effective_weight(weight, factors).abs()
    size = reference.effective_weight(weight.abs(), magnitudes(factors))
    return unit(dtype) * exact + 1.01 * (len(factors) + 3) * compute_unit(dtype) * size + torch.finfo(dtype).tiny


def case(m, n, ranks, dtype, factor_dtype=None, tokens=9):
    weight, bias, factors = make(m, n, ranks, dtype, factor_dtype)
    factors = [f._replace(scaling=f.scaling / 3) for f in factors]
    return torch.randn(tokens, n).to(dtype), weight.detach(), bias.detach(), factors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "ranks"), SHAPES)
@pytest.mark.parametrize("backend", [cpu, composite])
def test_the_weight_is_rounded_once(backend, m, n, ranks, dtype):
    # factors of the weight's own dtype too: what is made of them before the rounding is in float32
    for factor_dtype in (dtype, torch.float64 if dtype == torch.float64 else torch.float32):
        _, weight, _, factors = case(m, n, ranks, dtype, factor_dtype)
        with torch.no_grad():
            actual = backend.scaled_weight(ScaledWeight(weight, factors, True, dtype))
        error = (actual.double() - reference.effective_weight(weight, factors)).abs()
        assert actual.dtype == dtype
        assert (error <= weight_bound(weight, factors, dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "ranks"), SHAPES)
def test_the_layer_by_weight(m, n, ranks, dtype):
    x, weight, bias, factors = case(m, n, ranks, dtype)
    with torch.no_grad():
        y = cpu.linear_by_weight(x, ScaledWeight(weight, factors, True, dtype), bias)
    bound = (3 * unit(dtype) + (n + len(ranks) + 4) * compute_unit(dtype)) * terms(x, weight, bias, factors)
    assert ((y.double() - reference.linear(x, weight, bias, factors)).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "ranks"), SHAPES)
def test_the_layer_by_activation(m, n, ranks, dtype):
    x, weight, bias, factors = case(m, n, ranks, dtype)
    with torch.no_grad():
        y = by_activation.linear(x, ScaledWeight(weight, factors, True, dtype), bias)
    bound = ((len(ranks) + 3) * unit(dtype) + (n + len(ranks) + 4) * compute_unit(dtype)) * terms(
        x, weight, bias, factors
    )
    assert ((y.double() - reference.linear(x, weight, bias, factors)).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "ranks"), SHAPES)
@pytest.mark.parametrize("way", [cpu, by_activation])
def test_merged_against_unmerged(way, m, n, ranks, dtype):
    x, weight, bias, factors = case(m, n, ranks, dtype)
    with torch.no_grad():
        linear = by_activation.linear if way is by_activation else way.linear_by_weight
        unmerged = linear(x, ScaledWeight(weight, factors, True, dtype), bias)
        merged = F.linear(x, merged_weight(weight, factors), bias)
    roundings = 6 if way is cpu else len(ranks) + 6
    bound = (roundings * unit(dtype) + 2 * (n + len(ranks) + 4) * compute_unit(dtype)) * terms(
        x, weight, bias, factors
    )
    assert ((merged.double() - unmerged.double()).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "ranks"), SHAPES)
def test_the_gradients_of_the_factors_are_rounded_once(m, n, ranks, dtype):
    """Given gyᵀx: the sums over it are in float32 whatever the dtype of the factors."""
    _, weight, _, factors = case(m, n, ranks, dtype, dtype)
    product = torch.randn(m, n).to(dtype)
    with torch.no_grad():
        pairs = composite.factor_gradients(product, weight, factors)
    ones = torch.eye(n, dtype=torch.double)  # gyᵀ · 1 = gyᵀ, the product itself
    expected = reference.gradients(ones, weight, factors, product.double().T)
    size = reference.gradients(ones, weight.abs(), magnitudes(factors), product.double().T.abs())
    for index, (grad_A, grad_B) in enumerate(pairs):
        for actual, part in ((grad_A, "A"), (grad_B, "B")):
            room = unit(dtype) * expected[part][index].abs() + (m + n + 4) * compute_unit(dtype) * size[part][index]
            assert actual.dtype == dtype
            assert ((actual.double() - expected[part][index]).abs() <= room + torch.finfo(dtype).tiny).all()


@pytest.mark.parametrize("double", ["product", "weight", "factors"])
def test_one_input_in_float64_makes_the_sums_float64(double):
    weight, _, factors = make(12, 10, [4, 3], torch.float32)
    product = torch.randn(12, 10)
    weight = weight.detach().to(torch.float64 if double == "weight" else torch.float32)
    product = product.to(torch.float64 if double == "product" else torch.float32)
    if double == "factors":
        factors = [Factors(A.detach().double(), B.detach().double(), s) for A, B, s in factors]
    with torch.no_grad():
        pairs = composite.factor_gradients(product, weight, factors)
        exact = composite.factor_gradients(
            product.double(), weight.double(), [Factors(A.double(), B.double(), s) for A, B, s in factors]
        )
    for pair, expected in zip(pairs, exact, strict=True):
        for actual, wanted in zip(pair, expected, strict=True):
            assert torch.equal(actual, wanted.to(actual.dtype))


@pytest.mark.parametrize("double", ["weight", "A", "B"])
@pytest.mark.parametrize("backend", [cpu, composite])
def test_one_input_in_float64_makes_the_weight_in_float64(backend, double):
    weight, _, factors = make(12, 10, [4, 3], torch.float32)
    weight = weight.detach().to(torch.float64 if double == "weight" else torch.float32)
    factors = [
        Factors(
            A.detach().to(torch.float64 if double == "A" else A.dtype),
            B.detach().to(torch.float64 if double == "B" else B.dtype),
            s,
        )
        for A, B, s in factors
    ]
    with torch.no_grad():
        actual = backend.scaled_weight(ScaledWeight(weight, factors, True, torch.float64))
    torch.testing.assert_close(actual, reference.effective_weight(weight, factors), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("double", ["x", "weight", "A", "B"])
def test_one_input_in_float64_makes_the_activations_in_float64(double):
    weight, bias, factors = make(12, 10, [4, 3], torch.float32)
    kind = {name: torch.float64 if name == double else torch.float32 for name in ("x", "weight", "A", "B")}
    x = torch.randn(3, 10).to(kind["x"])
    weight, bias = weight.detach().to(kind["weight"]), bias.detach().double()
    factors = [Factors(A.detach().to(kind["A"]), B.detach().to(kind["B"]), s) for A, B, s in factors]
    with torch.no_grad():
        y = by_activation.linear(x, ScaledWeight(weight, factors, True, torch.float64), bias)
    torch.testing.assert_close(y, reference.linear(x, weight, bias, factors), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("identity", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_for_double_backward_are_the_gradients(identity, with_bias, fan_in_fan_out, autocast, frozen):
    weight, bias, factors = make(12, 10, [4, 3], torch.float32, fan_in_fan_out=fan_in_fan_out, bias=with_bias)
    weight.requires_grad_(not frozen)
    x = torch.randn(5, 10, requires_grad=True)
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        y = spp_linear(x, weight, bias, factors, fan_in_fan_out=fan_in_fan_out, identity=identity)
    grad_y = torch.randn_like(y)
    inputs = [x, *([] if frozen else [weight]), *([bias] if with_bias else []), *(t for f in factors for t in f[:2])]
    plain = torch.autograd.grad(y, inputs, grad_y, retain_graph=True)
    differentiable = torch.autograd.grad(y, inputs, grad_y, create_graph=True)
    tolerance = 2e-2 if autocast else 1e-5
    for a, b in zip(plain, differentiable, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * a.abs().max().item())


@pytest.mark.parametrize("with_bias", [True, False])
def test_the_fallback_computes_in_the_dtype_asked_for(with_bias):
    weight, bias, factors = make(12, 10, [4], torch.float32, bias=with_bias)
    x, grad_y = torch.randn(5, 10), torch.randn(5, 12, dtype=torch.bfloat16)
    with torch.no_grad():
        y = composite.linear_by_weight(x, ScaledWeight(weight, factors, True, torch.bfloat16), bias)
        w = ScaledWeight(weight, factors, True, torch.bfloat16)
        grads = composite.linear_backward(grad_y, x, w, needs_x=True, needs_factors=True)
    assert y.dtype == torch.bfloat16
    assert [grad.dtype for grad in grads] == [torch.float32] * 3
    expected = reference.gradients(x, weight, factors, grad_y)
    for actual, wanted in zip(grads, (expected["x"], expected["A"][0], expected["B"][0]), strict=True):
        assert (actual.double() - wanted).norm() < 1e-2 * wanted.norm()


@pytest.mark.parametrize("transposed", [False, True])
def test_the_gradient_of_the_weight_is_laid_out_as_the_weight(transposed):
    weight, _, factors = make(12, 10, [4], torch.float32, fan_in_fan_out=transposed)
    w = weight.detach().T if transposed else weight.detach()
    strides = []

    class Backend(Composite):
        def factor_gradients(self, product, weight, factors):
            strides.append(product.stride())
            return []

    scaled = ScaledWeight(w, factors, True, torch.float32)
    Backend().linear_backward(torch.randn(5, 12), torch.randn(5, 10), scaled, False, True)
    assert strides == [w.stride()]


@pytest.mark.parametrize("identity", [True, False])
def test_the_device_is_that_of_the_inputs(identity):
    """On the meta device, which stands for any but the default one."""
    x, weight, bias = (torch.empty(shape, device="meta") for shape in ((3, 10), (12, 10), (12,)))
    factors = [Factors(torch.empty(r, 10, device="meta"), torch.empty(12, 1, device="meta"), 1.0) for r in (4, 5)]
    assert by_activation.linear(x, ScaledWeight(weight, factors, identity, torch.float32), bias).device.type == "meta"
    assert (
        composite.linear_by_weight(x, ScaledWeight(weight, factors, identity, torch.float32), bias).device.type
        == "meta"
    )
    assert scaled_weight(weight, factors, identity=identity).device.type == "meta"
