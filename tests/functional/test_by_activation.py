# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from peft_spp.functional import spp_linear
from peft_spp.functional.kernels import by_activation
from peft_spp.functional.kernels.scaled import ScaledWeight

from helpers import reference
from helpers.factored import make, relative_error


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
        y = by_activation.linear(x, ScaledWeight(w, factors, identity, torch.double), bias)
    torch.testing.assert_close(y, reference.linear(x, w, bias, factors, identity=identity))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_is_within_its_rounding(dtype, bound):
    W, bias, factors = make(96, 80, [7], dtype, torch.float32)
    x = torch.randn(2, 2, 80).to(dtype)
    with torch.no_grad():
        y = by_activation.linear(x, ScaledWeight(W, factors, True, dtype), bias)
    assert y.dtype == dtype and y.shape == (2, 2, 96)
    assert relative_error(y, reference.linear(x, W, bias, factors)) < bound


def test_few_tokens_go_by_activation_and_many_by_weight():
    W, _, factors = make(1024, 512, [16], torch.float32)
    assert by_activation.is_cheaper(1, ScaledWeight(W, factors, True, torch.float32))
    assert not by_activation.is_cheaper(1024, ScaledWeight(W, factors, True, torch.float32))
    # as many row blocks as rows: the two rows of x for each block would be more than W
    _, _, one_row_a_block = make(1024, 512, [1024], torch.float32)
    assert not by_activation.is_cheaper(1, ScaledWeight(W, one_row_a_block, True, torch.float32))


def test_weights_that_cost_nothing_go_by_weight():
    _, _, factors = make(512, 512, [4], torch.float32)
    assert by_activation.is_cheaper(1, ScaledWeight(torch.empty(512, 512), factors, True, torch.float32))
    assert not by_activation.is_cheaper(1, ScaledWeight(torch.empty(511, 512), factors, True, torch.float32))


def most_tokens(weight, factors, dtype=torch.float32):
    """Up to how many tokens this way is cheaper."""
    tokens = 0
    while by_activation.is_cheaper(tokens + 1, ScaledWeight(weight, factors, True, dtype)):
        tokens += 1
    return tokens


def test_each_adapter_and_each_row_block_makes_this_way_dearer():
    W, _, one = make(1024, 512, [4], torch.float32)
    more_blocks, two = make(1024, 512, [64], torch.float32)[2], [*one, *one]
    few = [most_tokens(W, factors) for factors in (more_blocks, two)]
    assert 1 < min(few) and max(few) < most_tokens(W, one) < 100
    # 64 scaled rows of x for each token, with a weight of 1024
    assert most_tokens(W, more_blocks) < 1024 / 64


def test_the_dtype_and_the_device_count():
    W, _, factors = make(1024, 512, [4], torch.float32)
    # a matmul in bfloat16 is the faster one, in float16 PyTorch makes W' more slowly
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    assert [most_tokens(W, factors, dtype) for dtype in dtypes] == sorted(most_tokens(W, factors, d) for d in dtypes)
    assert len({most_tokens(W, factors, dtype) for dtype in dtypes}) == 3
    elsewhere = W.detach().to("meta")  # stands for a device that nothing is known of
    assert by_activation.is_cheaper(1, ScaledWeight(elsewhere, factors, True, torch.float32))


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
