# SPDX-License-Identifier: Apache-2.0
"""The gradients of W' as a tensor of its own, of a matrix and of a stack."""

import pytest
import torch

from peft_spp.functional import Factors, scaled_weight

from helpers.factored import make


SHAPES = pytest.mark.parametrize("shape", [(12, 10), (2, 6, 10)])
TENSORS = ["W", "A of the first", "A of the second", "B of the first", "B of the second"]


def case(shape, dtype=torch.double):
    weight, _, factors = make(12, 10, [4, 2], dtype)
    weight = weight.detach().view(shape).requires_grad_()
    return weight, dict(zip(TENSORS, (weight, *(f.A for f in factors), *(f.B for f in factors)), strict=True))


def run(weight, tensors, **settings):
    _, *rest = tensors.values()
    return scaled_weight(weight, [Factors(A, B, 0.5) for A, B in zip(rest[:2], rest[2:], strict=True)], **settings)


@SHAPES
@pytest.mark.parametrize("identity", [True, False])
def test_they_can_be_differentiated_again(shape, identity):
    weight, tensors = case(shape)
    inputs = tuple(tensors.values())
    result = run(weight, tensors, identity=identity)
    grad = torch.randn_like(result).requires_grad_()
    plain = torch.autograd.grad(result, inputs, grad, retain_graph=True)
    differentiable = torch.autograd.grad(result, inputs, grad, create_graph=True)
    torch.testing.assert_close(differentiable, plain)
    # the gradient of W is grad ⊙ factor, so that of its sum with respect to grad is the factor: W' / W
    (factor,) = torch.autograd.grad(differentiable[0].sum(), grad)
    torch.testing.assert_close(weight * factor, result)


@SHAPES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_they_have_the_dtypes_of_the_inputs(shape, dtype):
    weight, tensors = case(shape, torch.float32)
    result = run(weight, tensors, dtype=dtype)
    assert result.dtype == dtype
    for create_graph in (False, True):
        grads = torch.autograd.grad(
            result, tuple(tensors.values()), torch.ones_like(result), create_graph=create_graph, retain_graph=True
        )
        assert {grad.dtype for grad in grads} == {torch.float32}


@SHAPES
@pytest.mark.parametrize("trained", [*([name] for name in TENSORS), ["W", "B of the second"], TENSORS[1:], []])
def test_each_is_the_same_whichever_others_are_asked_for(shape, trained):
    weight, tensors = case(shape)
    grad = torch.randn(shape, dtype=torch.double)

    def gradients(names):
        for name, tensor in tensors.items():
            tensor.requires_grad_(name in names)
            tensor.grad = None
        result = run(weight, tensors)
        assert result.requires_grad is bool(names)
        if names:
            result.backward(grad)
        return {name: tensor.grad for name, tensor in tensors.items()}

    everything = gradients(TENSORS)
    for name, one in gradients(trained).items():
        assert (one is not None) == (name in trained)
        assert one is None or torch.equal(one, everything[name])
