# SPDX-License-Identifier: Apache-2.0
"""`torch.func` transforms, batched gradients, forward-mode differentiation and second derivatives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from peft_spp.functional import Factors, scaled_weight, spp_linear
from peft_spp.functional.compressed import compress, compressed_linear
from peft_spp.functional.dequantized import spp_linear_dequantized

from helpers import reference


M, N, TOKENS = 5, 3, 2
CASES = ("linear", "conv1d", "two adapters", "update", "dequantized", "tensor scaling")


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"x": (TOKENS, N), "bias": (M,), "A": (2, N), "B": (M, 1), "A2": (3, N), "B2": (M, 1)}
    found = {name: torch.randn(shape, dtype=torch.double) for name, shape in shapes.items()}
    weight = torch.randn(M, N, dtype=torch.double)
    weight[torch.rand(M, N) < 0.5] = 0.0
    return {**found, "weight": weight}


def factors(case: str, t: dict[str, torch.Tensor]) -> list[Factors]:
    scaling = torch.tensor(1.5, dtype=torch.double) if case == "tensor scaling" else 1.5
    first = Factors(t["A"], t["B"], scaling)
    return [first, Factors(t["A2"], t["B2"], 0.5)] if case == "two adapters" else [first]


def layer(case: str, t: dict[str, torch.Tensor]) -> torch.Tensor:
    """The layer of one of the cases."""
    if case == "dequantized":
        return spp_linear_dequantized(t["x"], lambda: t["weight"].detach().clone(), t["bias"], factors(case, t))
    weight = t["weight"].t().contiguous() if case == "conv1d" else t["weight"]
    settings = {"fan_in_fan_out": case == "conv1d", "identity": case != "update"}
    return spp_linear(t["x"], weight, t["bias"], factors(case, t), **settings)


def plain(case: str, t: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same by the formula, in operations that PyTorch knows."""
    total = torch.zeros_like(t["weight"]) if case == "update" else torch.ones_like(t["weight"])
    for A, B, s in factors(case, t):
        index = [block for block, size in enumerate(reference.block_sizes(M, A.shape[0])) for _ in range(size)]
        total = total + s * A[index] * B
    return F.linear(t["x"], t["weight"] * total, t["bias"])


def wanted(case: str) -> list[str]:
    names = ["x", "bias", "A", "B"]
    return [*names, *(["A2", "B2"] if case == "two adapters" else []), *([] if case == "dequantized" else ["weight"])]


def of(compute, case: str, t: dict[str, torch.Tensor]):
    """A function of the tensors that the case differentiates, and these."""
    names = wanted(case)

    def function(*values: torch.Tensor) -> torch.Tensor:
        return compute(case, {**t, **dict(zip(names, values, strict=True))})

    return function, tuple(t[name].clone() for name in names)


def assert_close(found, expected) -> None:
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_transforms_give_the_derivatives_of_the_formula(tensors, case):
    f, values = of(layer, case, tensors)
    expected, _ = of(plain, case, tensors)
    arguments = tuple(range(len(values)))
    tangents = tuple(torch.randn_like(value) for value in values)
    cotangent = torch.randn(TOKENS, M, dtype=torch.double)
    assert_close(f(*values), expected(*values))
    assert_close(vjp(f, *values)[1](cotangent), vjp(expected, *values)[1](cotangent))
    assert_close(jvp(f, values, tangents), jvp(expected, values, tangents))
    assert_close(jacrev(f, arguments)(*values), jacrev(expected, arguments)(*values))
    assert_close(jacfwd(f, arguments)(*values), jacfwd(expected, arguments)(*values))
    loss, expected_loss = (lambda *v, g=g: g(*v).square().sum() for g in (f, expected))
    assert_close(grad(loss, arguments)(*values), grad(expected_loss, arguments)(*values))
    assert_close(hessian(loss, arguments)(*values), hessian(expected_loss, arguments)(*values))
    with torch.no_grad():
        assert_close(jacrev(f)(*values), jacrev(expected)(*values))


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_every_sample(tensors, case):
    f, values = of(layer, case, tensors)
    samples = torch.randn(7, TOKENS, N, dtype=torch.double)
    parameters = tuple(range(1, len(values)))

    def loss(x, *others):
        return f(x, *others).square().sum()

    in_dims = (0, *(None for _ in parameters))
    assert_close(vmap(f, in_dims)(samples, *values[1:]), torch.stack([f(x, *values[1:]) for x in samples]))
    found = vmap(grad(loss, parameters), in_dims)(samples, *values[1:])
    for index, x in enumerate(samples):
        others = [value.clone().requires_grad_() for value in values[1:]]
        expected = torch.autograd.grad(loss(x, *others), others)
        assert_close(tuple(one[index] for one in found), expected)


@pytest.mark.parametrize("case", CASES)
def test_an_ensemble_of_adapters(tensors, case):
    f, values = of(layer, case, tensors)
    stacked = tuple(torch.stack([value, 2 * value, -value]) for value in values)
    expected = torch.stack([f(*(stack[i] for stack in stacked)) for i in range(3)])
    assert_close(vmap(f)(*stacked), expected)
    # and a transform around a backward pass of another
    tangents = tuple(torch.randn_like(stack) for stack in stacked)
    found = vmap(lambda v, t: jvp(f, v, t)[1])(stacked, tangents)
    assert_close(found[1], jvp(f, tuple(s[1] for s in stacked), tuple(t[1] for t in tangents))[1])


@pytest.mark.parametrize("case", CASES)
def test_batched_gradients(tensors, case):
    f, values = of(layer, case, tensors)
    values = tuple(value.requires_grad_() for value in values)
    cotangents = torch.randn(6, TOKENS, M, dtype=torch.double)
    y = f(*values)
    for create_graph in (False, True):
        settings = {"retain_graph": True, "create_graph": create_graph}
        found = torch.autograd.grad(y, values, cotangents, is_grads_batched=True, **settings)
        for index, cotangent in enumerate(cotangents):
            expected = torch.autograd.grad(y, values, cotangent, retain_graph=True)
            assert_close(tuple(one[index] for one in found), expected)
    expected = torch.autograd.functional.jacobian(of(plain, case, tensors)[0], values)
    assert_close(torch.autograd.functional.jacobian(f, values, vectorize=True), expected)
    forward = torch.autograd.functional.jacobian(f, values, vectorize=True, strategy="forward-mode")
    assert_close(forward, expected)


@pytest.mark.parametrize("case", CASES)
def test_gradcheck_in_every_mode(tensors, case):
    f, values = of(layer, case, tensors)
    values = tuple(value.requires_grad_() for value in values)
    modes = {"check_batched_grad": True, "check_forward_ad": True, "check_batched_forward_grad": True}
    assert gradcheck(f, values, **modes)
    assert gradgradcheck(f, values, check_batched_grad=True, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode_where_nothing_else_needs_a_gradient(tensors, requires_grad):
    """An operator that forward mode does not know would lose the tangents silently."""
    f, values = of(layer, "linear", tensors)
    tangents = tuple(torch.randn_like(value) for value in values)
    expected = jvp(of(plain, "linear", tensors)[0], values, tangents)[1]
    with forward_ad.dual_level():
        duals = [
            forward_ad.make_dual(v.requires_grad_(requires_grad), t) for v, t in zip(values, tangents, strict=True)
        ]
        tangent = forward_ad.unpack_dual(f(*duals)).tangent
    assert_close(tangent, expected)


@pytest.mark.parametrize("rows", [4, 5])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_stack_of_weights(rows, transposed):
    torch.manual_seed(0)
    shapes = ((3, rows, N), (3 * 2, N), (3 * rows, 1))
    weight, A, B = (torch.randn(shape, dtype=torch.double) for shape in shapes)
    if transposed:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)

    def stack(weight, A, B):
        return scaled_weight(weight, [Factors(A, B, 1.5)])

    def one_by_one(weight, A, B):
        parts = zip(weight, A.unflatten(0, (3, 2)), B.unflatten(0, (3, rows)), strict=True)
        return torch.stack([w * (1 + 1.5 * a[[0] * (rows - rows // 2) + [1] * (rows // 2)] * b) for w, a, b in parts])

    values, arguments = (weight, A, B), (0, 1, 2)
    tangents = tuple(torch.randn_like(value) for value in values)
    assert_close(jacrev(stack, arguments)(*values), jacrev(one_by_one, arguments)(*values))
    assert_close(jvp(stack, values, tangents), jvp(one_by_one, values, tangents))
    scales = torch.tensor([1.0, -2.0], dtype=torch.double)
    found = vmap(lambda s: stack(weight, A, s * B))(scales)
    assert_close(found, torch.stack([one_by_one(weight, A, s * B) for s in scales]))
    needing = tuple(value.clone().requires_grad_() for value in values)
    modes = {"check_batched_grad": True, "check_forward_ad": True}
    assert gradcheck(stack, needing, **modes) and gradgradcheck(stack, needing, check_batched_grad=True)


@pytest.mark.parametrize("case", CASES)
def test_vmap_over_a_backward_pass(tensors, case):
    f, values = of(layer, case, tensors)
    values = tuple(value.requires_grad_() for value in values)
    cotangents = torch.randn(6, TOKENS, M, dtype=torch.double)
    y = f(*values)
    found = vmap(lambda v: torch.autograd.grad(y, values, v, retain_graph=True))(cotangents)
    for index, cotangent in enumerate(cotangents):
        expected = torch.autograd.grad(y, values, cotangent, retain_graph=True)
        assert_close(tuple(one[index] for one in found), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [3, 33])
@pytest.mark.parametrize("ranks", [(), (2,), (2, 3)])
def test_compressed_weights_in_transforms(ranks, tokens, dtype):
    torch.manual_seed(0)
    weight = torch.randn(12, 70).masked_fill(torch.rand(12, 70) < 0.5, 0.0).to(dtype)
    compressed, x, tangent = compress(weight), torch.randn(tokens, 70).to(dtype), torch.randn(tokens, 70).to(dtype)
    own = [Factors(torch.randn(r, 70), torch.randn(12, 1), 0.5) for r in ranks]

    def small(x, A=None):
        return compressed_linear(x, compressed, None, own if A is None else [own[0]._replace(A=A), *own[1:]])

    def dense(x, A=None):
        return spp_linear(x, weight, None, own if A is None else [own[0]._replace(A=A), *own[1:]])

    for transform in (
        lambda function: grad(lambda x: function(x).float().square().sum())(x),
        lambda function: jvp(function, (x,), (tangent,))[1],
        lambda function: vmap(grad(lambda x: function(x[None]).float().square().sum()))(x),
        lambda function: vmap(function)(x[:, None]),
        lambda function: jacrev(function)(x[:1]),
    ):
        torch.testing.assert_close(transform(small), transform(dense))
    if ranks:
        for transform in (grad, lambda function: jacfwd(grad(function))):
            found, expected = (
                transform(lambda A, function=function: function(x, A).float().square().sum())(own[0].A)
                for function in (small, dense)
            )
            torch.testing.assert_close(found, expected)
