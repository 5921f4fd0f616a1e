# SPDX-License-Identifier: Apache-2.0
"""The layer whose weight is made when it is needed, against the formula and the layer that keeps its weight."""

import pytest
import torch

from peft_spp.functional import Factors, spp_linear, spp_linear_dequantized

from helpers import reference
from helpers.factored import make, relative_error


class Dequantize:
    """Makes a fresh copy of a weight, and counts how often."""

    def __init__(self, weight):
        self.weight = weight.detach()
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return self.weight.clone()


def case(m=12, n=10, ranks=(4, 3), dtype=torch.double, factor_dtype=None, bias=True):
    weight, bias, factors = make(m, n, ranks, dtype, factor_dtype, bias=bias)
    x = torch.randn(2, 5, n).to(dtype).requires_grad_()
    return x, Dequantize(weight), bias, factors


def parameters(bias, factors):
    return [*([] if bias is None else [bias]), *(f.A for f in factors), *(f.B for f in factors)]


@pytest.mark.parametrize("identity", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("m", "n", "ranks"), [(16, 12, [4]), (17, 9, [5, 2]), (1, 4, [1]), (5, 1, [2])])
def test_forward_and_gradients_are_the_formula(m, n, ranks, with_bias, identity):
    x, dequantize, bias, factors = case(m, n, ranks, bias=with_bias)
    y = spp_linear_dequantized(x, dequantize, bias, factors, identity=identity)
    torch.testing.assert_close(y, reference.linear(x, dequantize.weight, bias, factors, identity))
    with torch.no_grad():
        assert torch.equal(spp_linear_dequantized(x, dequantize, bias, factors, identity=identity), y)
    grad_y = torch.randn_like(y)
    y.backward(grad_y)
    expected = reference.gradients(x, dequantize.weight, factors, grad_y)
    grad_x = grad_y @ reference.effective_weight(dequantize.weight, factors, identity)
    torch.testing.assert_close(x.grad, grad_x)
    for f, A, B in zip(factors, expected["A"], expected["B"], strict=True):
        torch.testing.assert_close(f.A.grad, A)
        torch.testing.assert_close(f.B.grad, B)
    if with_bias:
        torch.testing.assert_close(bias.grad, grad_y.sum((0, 1)))


def test_the_identity_is_the_default():
    x, dequantize, bias, factors = case()
    default = spp_linear_dequantized(x, dequantize, bias, factors)
    assert torch.equal(default, spp_linear_dequantized(x, dequantize, bias, factors, identity=True))


@pytest.mark.parametrize("identity", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_it_can_be_differentiated_twice(identity, with_bias, autocast):
    dtype = torch.double if autocast is None else torch.float32
    x, dequantize, bias, factors = case(6, 5, (2,), dtype, bias=with_bias)

    def f(x, *tensors):
        bias = tensors[-1] if with_bias else None
        packed = [Factors(tensors[0], tensors[1], 0.5)]
        return spp_linear_dequantized(x, dequantize, bias, packed, identity=identity)

    inputs = (x, *factors[0][:2], *([bias] if with_bias else []))
    if autocast is None:
        assert torch.autograd.gradcheck(f, inputs) and torch.autograd.gradgradcheck(f, inputs)
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        y = f(*inputs)
    grad_y = torch.randn_like(y)
    plain = torch.autograd.grad(y, inputs, grad_y, retain_graph=True)
    differentiable = torch.autograd.grad(y, inputs, grad_y, create_graph=True)
    tolerance = 2e-2 if autocast else 1e-12
    for a, b in zip(plain, differentiable, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * a.abs().max().item())


TRAINED = ["x", "bias", "A of the first", "A of the second", "B of the first", "B of the second"]


@pytest.mark.parametrize("trained", [*([name] for name in TRAINED), ["x", "bias"], ["bias", "B of the second"], []])
def test_each_gradient_is_the_same_whichever_others_are_asked_for(trained):
    x, dequantize, bias, factors = case()
    tensors = dict(zip(TRAINED, (x, *parameters(bias, factors)), strict=True))
    grad_y = torch.randn(2, 5, 12, dtype=torch.double)

    def gradients(names):
        for name, tensor in tensors.items():
            tensor.requires_grad_(name in names)
            tensor.grad = None
        y = spp_linear_dequantized(x, dequantize, bias, factors)
        assert y.requires_grad is bool(names)
        if names:
            y.backward(grad_y)
        return {name: tensor.grad for name, tensor in tensors.items()}

    everything = gradients(TRAINED)
    dequantize.calls = 0
    for name, grad in gradients(trained).items():
        assert (grad is not None) == (name in trained)
        assert grad is None or torch.equal(grad, everything[name])
    # once forward; once backward unless the bias alone is trained
    assert dequantize.calls == 1 + bool(set(trained) - {"bias"})


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("given", [None, torch.float32, torch.bfloat16])
def test_the_matmul_has_the_dtype_asked_for_or_that_of_the_input(given, dtype, bound):
    x, dequantize, bias, factors = case(96, 80, (7,), dtype, torch.float32)
    if given is not None:
        bound = max(bound, 8e-3 if given == torch.bfloat16 else 0.0)
    y = spp_linear_dequantized(x, dequantize, bias, factors, dtype=given)
    assert y.dtype == (given or dtype)
    assert relative_error(y, reference.linear(x, dequantize.weight, bias, factors)) < bound
    grad_y = torch.randn_like(y)
    y.backward(grad_y)
    expected = reference.gradients(x, dequantize.weight, factors, grad_y)
    assert relative_error(x.grad, expected["x"]) < bound
    assert relative_error(factors[0].A.grad, expected["A"][0]) < bound
    for tensor in (x, bias, factors[0].A, factors[0].B):
        assert tensor.grad.dtype == tensor.dtype


@pytest.mark.parametrize("given", [None, torch.float32])
@pytest.mark.parametrize("grads", [True, False])
def test_autocast_computes_in_its_dtype_as_for_a_weight_that_is_there(given, grads):
    x, dequantize, bias, factors = case(32, 24, (4,), torch.float32)
    with torch.set_grad_enabled(grads), torch.autocast("cpu", dtype=torch.bfloat16):
        y = spp_linear_dequantized(x, dequantize, bias, factors, dtype=given)
        expected = spp_linear(x, dequantize(), bias, factors)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)


@pytest.mark.parametrize("given", [None, torch.float64])
def test_autocast_leaves_float64_alone(given):
    x, dequantize, bias, factors = case(dtype=torch.float64 if given is None else torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert spp_linear_dequantized(x, dequantize, bias, factors, dtype=given).dtype == torch.float64


@pytest.mark.parametrize("create_graph", [False, True])
def test_autocast_in_backward_changes_nothing(create_graph):
    x, dequantize, bias, factors = case(8, 6, (2,), torch.float32)
    inputs = (x, *factors[0][:2], bias)

    def gradients(autocast):
        y = spp_linear_dequantized(x, dequantize, bias, factors).square().sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return torch.autograd.grad(y, inputs, create_graph=create_graph)

    assert all(torch.equal(a, b) for a, b in zip(gradients(False), gradients(True), strict=True))


def test_the_compilers_way_back_gives_the_same_gradients(monkeypatch):
    x, dequantize, bias, factors = case()
    inputs = (x, *parameters(bias, factors))
    grad_y = torch.randn(2, 5, 12, dtype=torch.double)
    for trained in (inputs, inputs[:1], inputs[1:]):
        y = spp_linear_dequantized(x, dequantize, bias, factors)
        expected = torch.autograd.grad(y, trained, grad_y, retain_graph=True)
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            actual = torch.autograd.grad(y, trained, grad_y)
        torch.testing.assert_close(actual, expected)


def test_only_the_input_and_the_parameters_are_kept_for_backward():
    x, dequantize, bias, factors = case()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        spp_linear_dequantized(x, dequantize, bias, factors)
    assert {t.data_ptr() for t in saved} <= {t.data_ptr() for t in (x, *parameters(bias, factors))}
    assert any(t is x for t in saved)


@pytest.mark.parametrize("grads", [True, False])
def test_factors_that_do_not_fit_are_refused(grads):
    x, dequantize, bias, factors = case()
    with torch.set_grad_enabled(grads), pytest.raises(ValueError, match="12"):
        spp_linear_dequantized(x, dequantize, bias, [factors[0]._replace(B=torch.zeros(11, 1).double())])
