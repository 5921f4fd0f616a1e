# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from peft_spp.functional import spp_linear
from peft_spp.functional.kernels import by_activation

import reference
from factored import make, relative_error


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("identity", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 3, 9])
@pytest.mark.parametrize(
    ("m", "n", "ranks"), [(16, 12, [4]), (17, 9, [5]), (7, 6, [1]), (6, 5, [6]), (1, 4, [1]), (16, 12, [4, 3, 16])]
)
def test_is_the_formula(m, n, ranks, tokens, with_bias, identity, fan_in_fan_out):
    W, bias, factors = make(m, n, ranks, fan_in_fan_out=fan_in_fan_out, bias=with_bias)
    w = W.T if fan_in_fan_out else W
    x = torch.randn(tokens, n, dtype=torch.double)
    with torch.no_grad():
        y = by_activation.linear(x, w, bias, factors, identity, torch.double)
    torch.testing.assert_close(y, reference.linear(x, w, bias, factors, identity=identity))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_is_within_its_rounding(dtype, bound):
    W, bias, factors = make(96, 80, [7], dtype, torch.float32)
    x = torch.randn(2, 2, 80).to(dtype)
    with torch.no_grad():
        y = by_activation.linear(x, W, bias, factors, True, dtype)
    assert y.dtype == dtype and y.shape == (2, 2, 96)
    assert relative_error(y, reference.linear(x, W, bias, factors)) < bound


def test_few_tokens_go_by_activation_and_many_by_weight():
    W, _, factors = make(1024, 512, [16], torch.float32)
    assert by_activation.is_cheaper(1, W, factors, torch.float32)
    assert not by_activation.is_cheaper(1024, W, factors, torch.float32)
    # as many row blocks as rows: the two rows of x for each block would be more than W
    _, _, one_row_a_block = make(1024, 512, [1024], torch.float32)
    assert not by_activation.is_cheaper(1, W, one_row_a_block, torch.float32)


@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_training_on_few_tokens_has_the_same_gradients_as_on_many(tokens):
    W, bias, factors = make(1024, 512, [16], torch.float32)
    x = torch.randn(tokens, 512, requires_grad=True)
    y = spp_linear(x, W.detach(), bias, factors)
    assert relative_error(y, reference.linear(x, W, bias, factors)) < 1e-6
    grad_y = torch.randn_like(y)
    y.backward(grad_y)
    expected = reference.gradients(x, W, factors, grad_y)
    assert relative_error(x.grad, expected["x"]) < 1e-6
    assert relative_error(factors[0].A.grad, expected["A"][0]) < 1e-6
    assert relative_error(factors[0].B.grad, expected["B"][0]) < 1e-6
