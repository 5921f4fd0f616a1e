# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch

from peft_spp.functional import Factors, scaled_weight, spp_linear
from peft_spp.functional.autograd import records_gradients
from peft_spp.functional.kernels import by_activation
from peft_spp.functional.kernels.composite import composite
from peft_spp.functional.kernels.cpu.backend import cpu

from helpers import reference
from helpers.factored import make, relative_error


# (rows m, columns n, r): r divides m, does not, r = 1, r = m, one row, one column
SHAPES = [(16, 12, 4), (17, 9, 5), (7, 6, 1), (6, 5, 6), (1, 4, 1), (5, 1, 2)]
INPUTS = [(None,), (3, None), (2, 3, None)]


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("x_shape", INPUTS)
@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_forward_and_gradients_are_the_formula(m, n, r, x_shape, fan_in_fan_out):
    W, bias, factors = make(m, n, [r], fan_in_fan_out=fan_in_fan_out)
    x = torch.randn(*x_shape[:-1], n, dtype=torch.double, requires_grad=True)
    y = spp_linear(x, W, bias, factors, fan_in_fan_out=fan_in_fan_out)
    oriented = W.T if fan_in_fan_out else W
    torch.testing.assert_close(y, reference.linear(x, oriented, bias, factors))

    grad_y = torch.randn_like(y)
    y.backward(grad_y)
    expected = reference.gradients(x, oriented, factors, grad_y)
    torch.testing.assert_close(x.grad, expected["x"])
    torch.testing.assert_close(factors[0].A.grad, expected["A"][0])
    torch.testing.assert_close(factors[0].B.grad, expected["B"][0])
    torch.testing.assert_close(bias.grad, grad_y.reshape(-1, m).sum(0))


@pytest.mark.parametrize("ranks", [[4, 4], [4, 1], [3, 16, 5]])
def test_several_adapters_add_up(ranks):
    W, bias, factors = make(16, 12, ranks)
    x = torch.randn(3, 12, dtype=torch.double, requires_grad=True)
    y = spp_linear(x, W, bias, factors)
    torch.testing.assert_close(y, reference.linear(x, W, bias, factors))
    grad_y = torch.randn_like(y)
    y.backward(grad_y)
    expected = reference.gradients(x, W, factors, grad_y)
    torch.testing.assert_close(x.grad, expected["x"])
    for f, A, B in zip(factors, expected["A"], expected["B"], strict=True):
        torch.testing.assert_close(f.A.grad, A)
        torch.testing.assert_close(f.B.grad, B)


@pytest.mark.parametrize("identity", [True, False])
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_gradcheck(m, n, r, fan_in_fan_out, identity):
    W, bias, factors = make(m, n, [r, 1], fan_in_fan_out=fan_in_fan_out)
    x = torch.randn(2, n, dtype=torch.double, requires_grad=True)

    def f(x, W, bias, *ab):
        packed = [Factors(ab[0], ab[1], 0.5), Factors(ab[2], ab[3], 1.5)]
        return spp_linear(x, W, bias, packed, fan_in_fan_out=fan_in_fan_out, identity=identity)

    inputs = (x, W, bias, *(t for g in factors for t in g[:2]))
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


# Bounds on ‖error‖/‖value‖ from the rounding model: one rounding of W' and of the matmul's operands and result, each
# of relative size eps, adding up at random over the sums; for the factors' gradients one more, of gyᵀx.
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)]
)
@pytest.mark.parametrize("factor_dtype", [None, torch.float32])
def test_every_dtype_is_within_its_rounding(dtype, bound, factor_dtype):
    W, bias, factors = make(96, 80, [7], dtype, factor_dtype)
    if factor_dtype is not None and dtype == torch.float64:
        factor_dtype = torch.float64
        W, bias, factors = make(96, 80, [7], dtype, torch.float32)
    x = torch.randn(40, 80).to(dtype).requires_grad_()
    y = spp_linear(x, W, bias, factors)
    assert y.dtype == dtype
    assert relative_error(y, reference.linear(x, W, bias, factors)) < bound
    grad_y = torch.randn_like(y)
    y.backward(grad_y)
    expected = reference.gradients(x, W, factors, grad_y)
    factor_bound = max(bound, 1e-6) if factors[0].A.dtype == torch.float32 else bound
    assert relative_error(x.grad, expected["x"]) < bound
    assert relative_error(factors[0].A.grad, expected["A"][0]) < factor_bound
    assert relative_error(factors[0].B.grad, expected["B"][0]) < factor_bound
    for tensor in (x, W, bias, factors[0].A, factors[0].B):
        assert tensor.grad.dtype == tensor.dtype


def test_non_contiguous_tensors():
    _, bias, factors = make(12, 8, [5])
    x = torch.randn(8, 3, 2, dtype=torch.double).permute(1, 2, 0).requires_grad_()
    strided = torch.randn(24, 16, dtype=torch.double)[::2, ::2]
    y = spp_linear(x, strided, bias, factors)
    torch.testing.assert_close(y, reference.linear(x, strided, bias, factors))
    grad_y = torch.randn(2, 3, 12, dtype=torch.double).transpose(0, 1)
    y.backward(grad_y)
    expected = reference.gradients(x, strided, factors, grad_y)
    torch.testing.assert_close(x.grad, expected["x"])
    torch.testing.assert_close(factors[0].A.grad, expected["A"][0])


def test_no_tokens():
    W, bias, factors = make(6, 4, [2])
    x = torch.randn(0, 4, dtype=torch.double, requires_grad=True)
    spp_linear(x, W, bias, factors).sum().backward()
    assert x.grad.shape == (0, 4)
    assert not factors[0].A.grad.any() and not factors[0].B.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype_from_full_precision_weights(dtype):
    W, bias, factors = make(32, 24, [4], torch.float32)
    x = torch.randn(10, 24, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        y = spp_linear(x, W, bias, factors)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert relative_error(y, reference.linear(x, W, bias, factors)) < 1e-2
    for tensor in (x, W, bias, factors[0].A, factors[0].B):
        assert tensor.grad.dtype == torch.float32


def test_autocast_in_backward_changes_nothing():
    W, bias, factors = make(8, 6, [2], torch.float32)
    x = torch.randn(5, 6, requires_grad=True)
    plain = torch.autograd.grad(spp_linear(x, W, bias, factors).sum(), (x, factors[0].A))
    y = spp_linear(x, W, bias, factors).sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.autograd.grad(y, (x, factors[0].A))
    for a, b in zip(plain, inside, strict=True):
        assert torch.equal(a, b)


def test_nothing_of_the_weights_size_is_kept_for_backward():
    W, bias, factors = make(64, 48, [4], torch.float32)
    x = torch.randn(5, 48, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        spp_linear(x, W, bias, factors)
    given = {t.data_ptr() for t in (x, W, bias, factors[0].A, factors[0].B)}
    assert {t.data_ptr() for t in saved} <= given
    # the parameter itself: sharded training frees and gathers its storage in between
    assert any(t is W for t in saved)


def test_a_weight_that_moves_between_forward_and_backward_is_noticed():
    W, bias, factors = make(8, 6, [2], torch.float32)
    x = torch.randn(5, 6, requires_grad=True)
    y = spp_linear(x, W, bias, factors)
    with torch.no_grad():
        W.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_inputs_are_left_alone():
    W, bias, factors = make(8, 6, [2, 3], torch.float32)
    x = torch.randn(5, 6, requires_grad=True)
    tensors = [x, W, bias, *(t for f in factors for t in f[:2])]
    before = copy.deepcopy([t.detach() for t in tensors])
    spp_linear(x, W, bias, factors).sum().backward()
    for a, b in zip(before, tensors, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("A_shape", "B_shape"), [((2, 5), (8, 1)), ((2, 6), (7, 1)), ((9, 6), (8, 1)), ((2, 6), (8,))]
)
def test_factors_that_do_not_fit_are_refused(A_shape, B_shape):
    W, bias, _ = make(8, 6, [2])
    factors = [Factors(torch.zeros(A_shape), torch.zeros(B_shape), 1.0)]
    with pytest.raises(ValueError, match="8"):
        spp_linear(torch.zeros(3, 6, dtype=torch.double), W, bias, factors)


def test_a_dtype_mismatch_is_refused_as_by_nn_linear():
    W, bias, factors = make(8, 6, [2], torch.bfloat16)
    with pytest.raises(RuntimeError, match="dtype"):
        spp_linear(torch.zeros(3, 6), W, bias, factors)


@pytest.mark.parametrize("shape", [(2, 12), (64, 12), (2, 1, 12), (4, 16, 12)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("backend", ["of the device", "fallback"])
def test_the_output_can_be_changed_in_place(shape, with_bias, backend, monkeypatch):
    if backend == "fallback":
        monkeypatch.setattr(cpu, "linear_by_weight", composite.linear_by_weight)
        monkeypatch.setattr(by_activation, "is_cheaper", lambda *args: False)
    W, bias, factors = make(16, 12, [4], torch.float32)
    x = torch.randn(shape)
    expected = spp_linear(x, W, bias if with_bias else None, factors) + 1
    y = spp_linear(x, W, bias if with_bias else None, factors).add_(1)
    torch.testing.assert_close(y, expected)
    grads = [torch.autograd.grad(t.square().sum(), factors[0].A)[0] for t in (y, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("identity", [True, False])
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_without_gradients_the_result_is_the_same(identity, fan_in_fan_out, with_bias, autocast):
    W, bias, factors = make(12, 10, [4, 3], torch.float32, fan_in_fan_out=fan_in_fan_out, bias=with_bias)
    x = torch.randn(5, 10)

    def run():
        return spp_linear(x, W, bias, factors, fan_in_fan_out=fan_in_fan_out, identity=identity)

    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        expected = run()
        with torch.no_grad():
            actual = run()
    assert expected.requires_grad and not actual.requires_grad
    assert actual.dtype == (autocast or torch.float32)
    assert torch.equal(actual, expected.detach())


TENSORS = ["x", "W", "bias", "A of the first", "B of the first", "A of the second", "B of the second"]


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize(
    "trained", [*([name] for name in TENSORS), ["x", "bias"], ["W", "B of the second"], ["bias", "A of the first"]]
)
def test_each_gradient_is_the_same_whichever_others_are_asked_for(trained, fan_in_fan_out):
    W, bias, factors = make(12, 10, [4, 3], fan_in_fan_out=fan_in_fan_out)
    x = torch.randn(5, 10, dtype=torch.double)
    tensors = dict(zip(TENSORS, (x, W, bias, *(t for f in factors for t in f[:2])), strict=True))
    grad_y = torch.randn(5, 12, dtype=torch.double)

    def gradients(names):
        for name, tensor in tensors.items():
            tensor.requires_grad_(name in names)
            tensor.grad = None
        spp_linear(x, W, bias, factors, fan_in_fan_out=fan_in_fan_out).backward(grad_y)
        return {name: tensor.grad for name, tensor in tensors.items()}

    everything = gradients(TENSORS)
    for name, grad in gradients(trained).items():
        assert (grad is not None) == (name in trained)
        if grad is not None:
            assert torch.equal(grad, everything[name])


@pytest.mark.parametrize(
    ("dtype", "A_dtype", "B_dtype"),
    [
        (torch.float64, torch.float64, torch.float64),
        (torch.float32, torch.float32, torch.float64),
        (torch.float32, torch.float64, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_a_scaling_that_is_a_tensor_gives_the_same_bits(dtype, A_dtype, B_dtype):
    W, bias, factors = make(12, 10, [4, 3], dtype)
    numbers = [
        Factors(f.A.detach().to(A_dtype).requires_grad_(), f.B.detach().to(B_dtype).requires_grad_(), s)
        for f, s in zip(factors, (1.3, 0.7), strict=True)
    ]
    tensors = [f._replace(scaling=torch.tensor(f.scaling, dtype=torch.float64)) for f in numbers]
    mixed = [numbers[0], tensors[1]]
    x = torch.randn(5, 10).to(dtype)
    inputs = [t for f in numbers for t in f[:2]]
    expected = spp_linear(x, W, bias, numbers)
    grads = torch.autograd.grad(expected.sum(), inputs)
    for given in (tensors, mixed):
        y = spp_linear(x, W, bias, given)
        assert y.dtype == dtype and torch.equal(y, expected)
        assert torch.equal(scaled_weight(W, given), scaled_weight(W, numbers))
        for found, wanted in zip(torch.autograd.grad(y.sum(), inputs), grads, strict=True):
            assert found.dtype == wanted.dtype
            torch.testing.assert_close(found, wanted)


def test_gradients_are_recorded_where_an_input_needs_one_and_they_are_on():
    plain, trained = torch.ones(2), torch.ones(2, requires_grad=True)
    assert records_gradients(plain, None, trained)
    assert not records_gradients(plain, None) and not records_gradients(None)
    with torch.no_grad():
        assert not records_gradients(trained)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_on_the_meta_device_there_are_shapes(fan_in_fan_out):
    W, bias, factors = make(7, 6, [3], fan_in_fan_out=fan_in_fan_out)
    empty = [
        Factors(A.detach().to("meta").requires_grad_(), B.detach().to("meta").requires_grad_(), s)
        for A, B, s in factors
    ]
    x = torch.empty(2, 5, 6, dtype=torch.double, device="meta", requires_grad=True)
    y = spp_linear(x, W.detach().to("meta"), bias.detach().to("meta"), empty, fan_in_fan_out=fan_in_fan_out)
    assert y.is_meta and y.shape == (2, 5, 7) and y.dtype == torch.double
    y.sum().backward()
    assert x.grad.shape == x.shape and empty[0].A.grad.shape == (3, 6) and empty[0].B.grad.shape == (7, 1)
