# SPDX-License-Identifier: Apache-2.0
"""Stacks of weights, as the experts of a mixture are: every layer as if it were alone."""

import pytest
import torch

from peft_spp.functional import Factors, merged_weight, scaled_weight
from peft_spp.functional.kernels import stack
from peft_spp.functional.kernels.composite import composite
from peft_spp.functional.kernels.cpu.backend import cpu

from helpers import reference
from helpers.factored import relative_error


# layers, rows, columns, ranks: equally long blocks; longer and shorter ones; several adapters; one row, one layer
SHAPES = [
    (3, 12, 10, [4]),
    (3, 13, 10, [4]),
    (4, 12, 7, [5, 3]),
    (2, 6, 9, [6, 2]),
    (3, 1, 5, [1]),
    (1, 9, 4, [2]),
    (5, 4, 1, [2, 1, 3]),
]
CASES = pytest.mark.parametrize(("layers", "m", "n", "ranks"), SHAPES)
LAYOUT = pytest.mark.parametrize("transposed", [False, True])


def make(layers, m, n, ranks, dtype=torch.double, transposed=False, seed=0):
    torch.manual_seed(seed)
    weight = torch.randn(layers, m, n, dtype=torch.double)
    weight[torch.rand(layers, m, n) < 0.5] = 0.0
    if transposed:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    factor_dtype = torch.promote_types(dtype, torch.float32)
    factors = [
        Factors(
            torch.randn(layers * r, n, dtype=factor_dtype).requires_grad_(),
            torch.randn(layers * m, 1, dtype=factor_dtype).requires_grad_(),
            0.5 + i,
        )
        for i, r in enumerate(ranks)
    ]
    return weight.to(dtype).detach().requires_grad_(), factors


def factors_of(factors, layer, layers):
    return [Factors(A.chunk(layers)[layer], B.chunk(layers)[layer], s) for A, B, s in factors]


def expected_weight(weight, factors, identity=True):
    layers = len(weight)
    return torch.stack(
        [reference.effective_weight(weight[e], factors_of(factors, e, layers), identity) for e in range(layers)]
    )


@CASES
@LAYOUT
@pytest.mark.parametrize("identity", [True, False])
def test_every_layer_of_a_stack_has_row_blocks_of_its_own(layers, m, n, ranks, transposed, identity):
    weight, factors = make(layers, m, n, ranks, transposed=transposed)
    expected = expected_weight(weight, factors, identity)
    result = scaled_weight(weight, factors, identity=identity)
    assert result.stride() == weight.stride()
    torch.testing.assert_close(result, expected, rtol=1e-14, atol=1e-14)
    with torch.no_grad():
        assert torch.equal(scaled_weight(weight, factors, identity=identity), result)


@CASES
@LAYOUT
def test_gradients_of_a_stack_are_those_of_its_layers(layers, m, n, ranks, transposed):
    weight, factors = make(layers, m, n, ranks, transposed=transposed)
    grad = torch.randn(layers, m, n, dtype=torch.double)
    scaled_weight(weight, factors).backward(grad)
    for e in range(layers):
        # with x the identity, gyᵀx is the gradient of W'
        one = factors_of(factors, e, layers)
        expected = reference.gradients(torch.eye(n, dtype=torch.double), weight[e], one, grad[e].T)
        for f, gA, gB in zip(factors, expected["A"], expected["B"], strict=True):
            torch.testing.assert_close(f.A.grad.chunk(layers)[e], gA)
            torch.testing.assert_close(f.B.grad.chunk(layers)[e], gB)
    ones = torch.ones_like(weight)
    torch.testing.assert_close(weight.grad, grad * expected_weight(ones, factors))


@pytest.mark.parametrize(("layers", "m", "n", "ranks"), [(2, 4, 3, [2]), (2, 5, 3, [2]), (2, 4, 2, [3, 2])])
@LAYOUT
def test_a_stack_can_be_differentiated_twice(layers, m, n, ranks, transposed):
    weight, factors = make(layers, m, n, ranks, transposed=transposed)

    def f(weight, *tensors):
        pairs = zip(tensors[::2], tensors[1::2], factors, strict=True)
        return scaled_weight(weight, [Factors(A, B, one.scaling) for A, B, one in pairs])

    tensors = (weight, *(t for f in factors for t in f[:2]))
    assert torch.autograd.gradcheck(f, tensors)
    assert torch.autograd.gradgradcheck(f, tensors)


@pytest.mark.parametrize(("m", "n", "ranks", "shape"), [(12, 10, [4, 5], (12, 10)), (12, 10, [4, 5], (1, 12, 10))])
def test_a_matrix_is_a_stack_of_one(m, n, ranks, shape):
    weight, factors = make(1, m, n, ranks)
    weight = weight.detach().view(shape)
    grad = torch.randn(m, n, dtype=torch.double)
    scaled_weight(weight, factors).backward(grad.view(shape))
    expected = reference.gradients(torch.eye(n, dtype=torch.double), weight.view(m, n), factors, grad.T)
    for f, gA, gB in zip(factors, expected["A"], expected["B"], strict=True):
        torch.testing.assert_close(f.A.grad, gA)
        torch.testing.assert_close(f.B.grad, gB)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
@LAYOUT
@pytest.mark.parametrize("rows", [12, 13])
def test_half_precision_is_rounded_once(rows, transposed, dtype, bound):
    weight, factors = make(3, rows, 20, [4, 3], dtype, transposed)
    result = scaled_weight(weight, factors)
    assert result.dtype == dtype
    assert relative_error(result, expected_weight(weight, factors)) < bound
    result.backward(torch.ones_like(result))
    assert {f.A.grad.dtype for f in factors} == {torch.float32}


def test_autocast_changes_nothing():
    weight, factors = make(3, 13, 10, [4], torch.float32)
    plain = scaled_weight(weight, factors)
    expected = torch.autograd.grad(plain.square().sum(), [factors[0].A, factors[0].B])
    with torch.autocast("cpu", torch.bfloat16):
        result = scaled_weight(weight, factors)
        grads = torch.autograd.grad(result.square().sum(), [factors[0].A, factors[0].B])
    assert torch.equal(result, plain)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize("grad_layout", ["expanded", "transposed"])
def test_the_gradient_may_be_laid_out_otherwise(grad_layout):
    weight, factors = make(3, 12, 12, [4])
    grad = torch.randn(12, 12, dtype=torch.double).expand(3, 12, 12)
    grad = grad if grad_layout == "expanded" else grad.contiguous().transpose(1, 2)
    scaled_weight(weight, factors).backward(grad)
    strided = [factors[0].A.grad, factors[0].B.grad]
    again, plain = make(3, 12, 12, [4])
    scaled_weight(again, plain).backward(grad.contiguous())
    torch.testing.assert_close(strided, [plain[0].A.grad, plain[0].B.grad])


@LAYOUT
def test_merging_keeps_zeros_of_every_layer(transposed):
    weight, factors = make(3, 13, 10, [4], torch.float32, transposed)
    weight.detach()[0, 0, 0] = -0.0
    with torch.no_grad():
        factors[0].A[0, 1] = float("inf")
        factors[0].B[20, 0] = float("nan")
    merged = merged_weight(weight.detach(), factors)
    zero = weight == 0
    assert (merged[zero] == 0).all() and not merged[zero].signbit().any()
    assert merged[~zero].isnan().any() and merged.stride() == weight.stride()


def test_only_the_inputs_are_kept_for_the_backward_pass():
    weight, factors = make(8, 64, 64, [4], torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        scaled_weight(weight, factors)
    inputs = {t.data_ptr() for t in (weight, factors[0].A, factors[0].B)}
    assert kept and {t.data_ptr() for t in kept} == inputs


@pytest.mark.parametrize(
    ("A", "B"), [((11, 10), (36, 1)), ((12, 9), (36, 1)), ((12, 10), (35, 1)), ((39, 10), (36, 1)), ((0, 10), (36, 1))]
)
def test_factors_that_do_not_fit_a_stack_are_refused(A, B):
    with pytest.raises(ValueError, match=r"36|between"):
        scaled_weight(torch.zeros(3, 12, 10), [Factors(torch.zeros(A), torch.zeros(B), 1.0)])


@pytest.mark.parametrize(("layers", "m", "n", "ranks"), [SHAPES[0], SHAPES[1], SHAPES[2]])
@LAYOUT
def test_backends_agree(layers, m, n, ranks, transposed):
    weight, factors = make(layers, m, n, ranks, torch.float32, transposed)
    grad = torch.randn(layers, m, n)
    with torch.no_grad():
        weights = [stack.scaled_weight(b, weight, factors, True, torch.float32) for b in (cpu, composite)]
        grads = [stack.factor_gradients(b, grad, weight, factors) for b in (cpu, composite)]
    torch.testing.assert_close(*weights)
    torch.testing.assert_close(*grads)


def test_the_operators_are_what_their_schema_says():
    for shape in ((3, 12, 10), (12, 10)):
        layers = 3 if len(shape) == 3 else 1
        weight, factors = make(layers, 12, 10, [4, 3])
        weight = weight.detach().view(shape)
        A, B, s = [f.A.detach() for f in factors], [f.B.detach() for f in factors], [f.scaling for f in factors]
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(
            torch.ops.peft_spp.scaled_weight.default, (weight, A, B, s, True, torch.bfloat16), test_utils=tests
        )
        for needs in [(True, True), (False, True), (True, False)]:
            torch.library.opcheck(
                torch.ops.peft_spp.scaled_weight_backward.default,
                (torch.randn_like(weight), weight, A, B, s, True, *needs),
                test_utils=tests,
            )


@pytest.mark.parametrize(
    ("ranks", "transposed", "parts"), [([4, 2], False, 1), ([4, 5], False, 3), ([5], False, 3), ([4], True, 3)]
)
def test_a_stack_is_one_tall_matrix_where_its_row_blocks_and_layout_allow_it(ranks, transposed, parts):
    weight, factors = make(3, 12, 10, ranks, transposed=transposed)
    walked = list(stack.walk_layers(factors, weight, torch.empty_like(weight)))
    assert len(walked) == parts
    for part, matrices in walked:
        assert [matrix.shape for matrix in matrices] == [(36 // parts, 10)] * 2
        assert [len(f.A) for f in part] == [3 * r // parts for r in ranks]
