# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from peft_spp.functional import dequantized
from peft_spp.functional.kernels import by_activation, ops
from peft_spp.functional.kernels.composite import Composite, composite
from peft_spp.functional.kernels.cpu.backend import cpu
from peft_spp.functional.kernels.scaled import ScaledWeight

from helpers import reference
from helpers.factored import make, relative_error


def split(factors):
    return [f.A for f in factors], [f.B for f in factors], [float(f.scaling) for f in factors]


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("ranks", [[4], [5, 3]])
def test_operators_are_what_their_schema_says(ranks, fan_in_fan_out):
    # a wrong shape, stride, dtype or alias in a schema or fake is a wrong result or a crash under torch.compile
    W, bias, factors = make(16, 12, ranks, torch.float32, fan_in_fan_out=fan_in_fan_out)
    W, bias = W.detach(), bias.detach()
    A, B, s = split([f._replace(A=f.A.detach(), B=f.B.detach()) for f in factors])
    x, grad_y = torch.randn(3, 12), torch.randn(3, 16)
    tests = ("test_schema", "test_faketensor")
    oriented = W.t() if fan_in_fan_out else W
    torch.library.opcheck(
        torch.ops.peft_spp.scaled_weight.default, (oriented, A, B, s, True, torch.bfloat16), test_utils=tests
    )
    torch.library.opcheck(
        torch.ops.peft_spp.linear.default,
        (x, W, bias, A, B, s, fan_in_fan_out, True, torch.float32),
        test_utils=tests,
    )
    for needs in [(True, True, True), (True, False, True), (False, False, True), (True, False, False)]:
        torch.library.opcheck(
            torch.ops.peft_spp.linear_backward.default,
            (grad_y, x, W, A, B, s, fan_in_fan_out, True, torch.float32, *needs),
            test_utils=tests,
        )


@pytest.mark.parametrize("identity", [True, False])
@pytest.mark.parametrize("ranks", [[4], [5, 3]])
def test_overwriting_the_weight_gives_the_same_bits_and_takes_its_place(ranks, identity):
    W, bias, factors = make(16, 12, ranks, torch.float32)
    W, x, grad_y = W.detach(), torch.randn(3, 12), torch.randn(3, 16)
    with torch.no_grad():
        w = ScaledWeight(W, factors, identity, torch.float32)
        buffer = W.clone()
        overwriting = composite.linear(x, w._replace(weight=buffer), bias, overwrite=True)
        assert torch.equal(overwriting, composite.linear(x, w, bias))
        assert torch.equal(buffer, composite.scaled_weight(w))
        buffer = W.clone()
        overwriting = composite.linear_backward(grad_y, x, w._replace(weight=buffer), True, True, overwrite=True)
        expected = composite.linear_backward(grad_y, x, w, True, True)
        assert all(torch.equal(a, b) for a, b in zip(overwriting, expected, strict=True))
        assert torch.equal(buffer, composite.scaled_weight(w))
        # of another dtype than the product, it is left alone
        buffer = W.clone()
        composite.linear(x, w._replace(weight=buffer, dtype=torch.bfloat16), bias, overwrite=True)
        assert torch.equal(buffer, W)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("m", "n", "ranks"), [(96, 80, [16]), (97, 33, [7, 4]), (5, 70, [5])])
def test_the_fallback_backend_is_the_formula(m, n, ranks, transposed, dtype, bound):
    W, bias, factors = make(m, n, ranks, dtype, torch.promote_types(dtype, torch.float32), fan_in_fan_out=transposed)
    w = W.detach().T if transposed else W.detach()
    x, grad_y = torch.randn(2, 40, n).to(dtype), torch.randn(2, 40, m).to(dtype)
    with torch.no_grad():
        y = composite.linear_by_weight(x, ScaledWeight(w, factors, True, dtype), bias)
        grad_x, *grads = composite.linear_backward(grad_y, x, ScaledWeight(w, factors, True, dtype), True, True)
    assert relative_error(y, reference.linear(x, w, bias, factors)) < bound
    expected = reference.gradients(x, w, factors, grad_y)
    assert relative_error(grad_x, expected["x"]) < bound
    for i, f in enumerate(factors):
        assert relative_error(grads[2 * i], expected["A"][i]) < bound
        assert relative_error(grads[2 * i + 1], expected["B"][i]) < bound
        assert (grads[2 * i].dtype, grads[2 * i + 1].dtype) == (f.A.dtype, f.B.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_make_the_same_weight(dtype):
    W, _, factors = make(97, 33, [7, 4], dtype, torch.float32)
    with torch.no_grad():
        a = cpu.scaled_weight(ScaledWeight(W, factors, True, dtype))
        b = composite.scaled_weight(ScaledWeight(W, factors, True, dtype))
    # at most the last bit: the one may fuse a multiplication and an addition where the other rounds in between
    torch.testing.assert_close(a, b, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(a == 0, b == 0)


@pytest.mark.parametrize("name", ["scaled_weight", "linear", "linear_backward"])
def test_a_device_without_a_backend_of_its_own_has_the_fallback(name):
    for key in ("CompositeExplicitAutograd", "CPU"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"peft_spp::{name}", key)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("identity", [True, False])
@pytest.mark.parametrize("backend", [composite, cpu])
def test_an_operator_uses_the_backend_it_is_given(backend, identity, fan_in_fan_out):
    W, bias, factors = make(16, 12, [4, 3], torch.float32, fan_in_fan_out=fan_in_fan_out)
    W, w = W.detach(), W.detach().T if fan_in_fan_out else W.detach()
    lists = split(factors)
    x, grad_y = torch.randn(5, 12), torch.randn(5, 16)
    used = []

    class Recorder(Composite):
        def scaled_weight(self, *args, **kwargs):
            used.append("scaled_weight")
            return super().scaled_weight(*args, **kwargs)

        def factor_gradients(self, *args):
            used.append("factor_gradients")
            return super().factor_gradients(*args)

    chosen = Recorder() if backend is composite else backend
    settings = (*lists, fan_in_fan_out, identity, torch.float32)
    with torch.no_grad():
        y = ops._linear(chosen, x, W, bias, *settings)
        grad_x, *grads = ops._linear_backward(chosen, grad_y, x, W, *settings, True, False, True)
    # W' comes last in the backward pass: it may be written over W
    assert used == (["scaled_weight", "factor_gradients", "scaled_weight"] if backend is composite else [])
    assert relative_error(y, reference.linear(x, w, bias, factors, identity=identity)) < 1e-6
    effective = reference.effective_weight(w, factors, identity)
    assert relative_error(grad_x, grad_y.double() @ effective) < 1e-6
    expected = reference.gradients(x, w, factors, grad_y)
    for actual, wanted in zip(grads[::2] + grads[1::2], expected["A"] + expected["B"], strict=True):
        assert relative_error(actual, wanted) < 1e-6


def test_an_operator_that_goes_by_activation_has_the_dtype_asked_for():
    W, bias, factors = make(1024, 512, [16], torch.float32)
    with torch.no_grad():
        y = ops._linear(cpu, torch.randn(1, 512), W, bias, *split(factors), False, True, torch.bfloat16)
    assert y.dtype == torch.bfloat16


class Backend(Composite):
    """One that notes what it is asked for, with the layer's passes of its own or without."""

    def __init__(self, whole_layer):
        self.calls = []
        if whole_layer:
            self.linear_by_weight = self.linear_backward = self._layer

    def _layer(self, *args, **kwargs):
        self.calls.append("layer")
        return []

    def scaled_weight(self, w, out=None):
        self.calls.append(("weight", out is w.weight))
        return super().scaled_weight(w, out)


@pytest.mark.parametrize("whole_layer", [True, False])
def test_a_backend_is_asked_for_the_layer_if_it_has_it_and_else_for_the_weight(whole_layer, monkeypatch):
    W, bias, factors = make(16, 12, [5, 3], torch.float32)
    W, A, B, s = W.detach(), *split(factors)
    x, grad_y = torch.randn(3, 12), torch.randn(3, 16)
    backend = Backend(whole_layer)
    needs = {"needs_x": True, "needs_factors": True}
    with torch.no_grad():
        ops._linear(backend, x, W, bias, A, B, s, False, True, torch.float32)
        ops._linear_backward(backend, grad_y, x, W, A, B, s, False, True, torch.float32, **needs, needs_weight=False)
        # a dequantized weight is the caller's to give away: W' is written there
        monkeypatch.setattr(dequantized, "_overwriting_backend", lambda weight: backend)
        dequantized._forward(x, W.clone, bias, True, torch.float32, s, [*A, *B])
        dequantized._backward(grad_y, x, W.clone(), [*A, *B], (s, True, torch.float32), True, True)
    assert backend.calls == (["layer"] * 4 if whole_layer else [("weight", in_place) for in_place in (0, 0, 1, 1)])


def test_where_a_dequantized_weight_may_be_overwritten():
    assert dequantized._overwriting_backend(torch.empty(2, 2, device="meta")) is composite
    assert dequantized._overwriting_backend(torch.empty(2, 2)) is None
    with FakeTensorMode():
        assert dequantized._overwriting_backend(torch.empty(2, 2, device="cuda")) is None


@pytest.mark.parametrize("backend", [cpu, composite])
def test_gradients_have_the_dtypes_of_the_inputs_and_not_of_the_matmul(backend):
    W, _, factors = make(16, 12, [5, 3], torch.float32)
    W, A, B, s = W.detach(), *split(factors)
    x, grad_y = torch.randn(3, 12), torch.randn(3, 16).bfloat16()
    needs = {"needs_x": True, "needs_weight": True, "needs_factors": True}
    with torch.no_grad():
        grads = ops._linear_backward(backend, grad_y, x, W, A, B, s, False, True, torch.bfloat16, **needs)
        more = ops._scaled_weight_backward(backend, torch.randn(16, 12).bfloat16(), W, A, B, s, True, True, True)
    assert {grad.dtype for grad in (*grads, *more)} == {torch.float32}


@pytest.mark.parametrize("backward", [cpu.linear_backward, composite.linear_backward])
def test_only_the_gradients_that_are_needed_are_computed(backward):
    W, _, factors = make(16, 12, [5, 3], torch.float32)
    x, grad_y = torch.randn(3, 12), torch.randn(3, 16)
    with torch.no_grad():
        w = ScaledWeight(W, factors, True, torch.float32)
        grad_x, *grads = backward(grad_y, x, w, True, True)
        assert [g.shape for g in (grad_x, *grads)] == [x.shape, *(t.shape for f in factors for t in f[:2])]
        (only_x,) = backward(grad_y, x, w, True, False)
        no_x = backward(grad_y, x, w, False, True)
        assert backward(grad_y, x, w, False, False) == []
    assert torch.equal(only_x, grad_x) and all(torch.equal(a, b) for a, b in zip(no_x, grads, strict=True))


def test_lists_of_different_lengths_are_refused():
    W, bias, factors = make(16, 12, [5, 3], torch.float32)
    A, B, s = split(factors)
    for lists in ((A[:1], B, s), (A, B[:1], s), (A, B, s[:1])):
        with pytest.raises(ValueError, match=r"shorter|longer"), torch.no_grad():
            torch.ops.peft_spp.linear(torch.randn(3, 12), W, bias, *lists, False, True, torch.float32)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_a_layer_goes_by_activation_for_as_many_tokens_as_that_is_cheaper(dtype, fan_in_fan_out):
    W, bias, factors = make(1024, 512, [4], torch.float32, fan_in_fan_out=fan_in_fan_out)
    w = W.T if fan_in_fan_out else W
    tokens = 1
    while by_activation.is_cheaper(tokens + 1, ScaledWeight(w, factors, True, dtype)):
        tokens += 1
    backend = Backend(whole_layer=True)
    with torch.no_grad():
        for shape in ((tokens, 512), (1, tokens, 512), (tokens + 1, 512)):
            assert backend.calls == []
            ops._linear(backend, torch.randn(shape), W, bias, *split(factors), fan_in_fan_out, True, dtype)
    assert backend.calls == ["layer"]
