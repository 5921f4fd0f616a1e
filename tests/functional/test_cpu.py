# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from peft_spp.functional import scaled_weight, spp_linear
from peft_spp.functional.kernels.cpu import backend as cpu_backend
from peft_spp.functional.kernels.cpu import tiled
from peft_spp.functional.kernels.cpu.backend import cpu
from peft_spp.functional.kernels.cpu.tiled import TiledElementwise
from peft_spp.functional.kernels.scaled import ScaledWeight

from helpers import reference
from helpers.factored import make, relative_error


# a result of the wrong shape would be resized, with a warning
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("tile", "chunk"), [(30, 70), (1, 1), (20, 200), (200, 30)])
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("identity", [True, False])
@pytest.mark.parametrize(
    ("m", "n", "ranks"), [(23, 10, [4]), (24, 10, [4, 4]), (7, 40, [7]), (9, 5, [1]), (70, 9, [4, 3]), (1, 70, [1])]
)
def test_small_chunks_and_tiles_change_nothing(monkeypatch, m, n, ranks, identity, fan_in_fan_out, tile, chunk):
    W, bias, factors = make(m, n, ranks, fan_in_fan_out=fan_in_fan_out)
    W = W.detach()
    x = torch.randn(2, 5, n, dtype=torch.double, requires_grad=True)
    inputs = (x, bias, *(t for f in factors for t in f[:2]))

    def run(bias):
        y = spp_linear(x, W, bias, factors, identity=identity, fan_in_fan_out=fan_in_fan_out)
        grads = torch.autograd.grad(y.square().sum(), inputs, allow_unused=True)
        return y, *(g for g in grads if g is not None)

    whole = [run(bias), run(None)]
    monkeypatch.setattr(tiled, "TILE_ELEMENTS", tile)
    monkeypatch.setattr(cpu_backend, "CHUNK_ELEMENTS", chunk)
    for expected, actual in zip(whole, [run(bias), run(None)], strict=True):
        for a, b in zip(expected, actual, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("ranks", [[7], [7, 4, 96]])
def test_chunks_keep_the_rounding_bounds(monkeypatch, dtype, bound, ranks):
    monkeypatch.setattr(tiled, "TILE_ELEMENTS", 200)
    monkeypatch.setattr(cpu_backend, "CHUNK_ELEMENTS", 400)
    W, bias, factors = make(96, 80, ranks, dtype, torch.float32)
    x = torch.randn(40, 80).to(dtype).requires_grad_()
    y = spp_linear(x, W.detach(), bias, factors)
    assert relative_error(y, reference.linear(x, W, bias, factors)) < bound
    grad_y = torch.randn_like(y)
    y.backward(grad_y)
    expected = reference.gradients(x, W, factors, grad_y)
    assert relative_error(x.grad, expected["x"]) < bound
    for f, A, B in zip(factors, expected["A"], expected["B"], strict=True):
        assert relative_error(f.A.grad, A) < bound
        assert relative_error(f.B.grad, B) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("identity", [True, False])
def test_the_weight_does_not_depend_on_how_it_is_cut(monkeypatch, dtype, identity):
    W, _, factors = make(61, 33, [5, 3], dtype, torch.float32)
    with torch.no_grad():
        whole = scaled_weight(W, factors, identity=identity)
        monkeypatch.setattr(tiled, "TILE_ELEMENTS", 100)
        cut = scaled_weight(W, factors, identity=identity)
    assert torch.equal(whole, cut)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_the_size_of_the_weight_or_a_converted_input_is_made(monkeypatch, dtype):
    monkeypatch.setattr(tiled, "TILE_ELEMENTS", 1 << 10)
    monkeypatch.setattr(cpu_backend, "CHUNK_ELEMENTS", 1 << 12)
    W, bias, factors = make(256, 512, [8], dtype, torch.float32)
    x = torch.randn(100, 512, dtype=dtype, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        spp_linear(x, W.detach(), bias, factors).sum().backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    # the gradient of x is the largest there is; x in float32 would be twice that in bfloat16
    assert largest == x.numel() * x.element_size() < W.numel() * W.element_size()


class Noting(TiledElementwise):
    """Elementwise work in PyTorch's operations that notes which parts of the weight it is given."""

    def __init__(self, *args):
        super().__init__(*args)
        self.scaled, self.summed = [], []

    def write_scaled(self, out, rows, columns, identity):
        self.scaled.append((rows, columns))
        super().write_scaled(out, rows, columns, identity)

    def add_factor_gradients(self, product, rows, columns):
        self.summed.append((rows, columns))
        super().add_factor_gradients(product, rows, columns)


@pytest.fixture
def works(monkeypatch):
    """The work of each pass, of which there is one a weight."""
    made = []

    def elementwise(w, *_):
        made.append(Noting(w.weight, w.factors))
        return made[-1]

    monkeypatch.setattr(cpu_backend, "_elementwise", elementwise)
    return made


@pytest.mark.parametrize(("dtype", "scaling", "both"), [(torch.float32, 1, 2), (torch.bfloat16, 3, 3)])
def test_scratch_has_the_size_of_a_tile_and_is_used_again(works, monkeypatch, dtype, scaling, both):
    """How many tiles there are: what is in the dtype of the sums already needs no tile to be converted into."""
    monkeypatch.setattr(tiled, "TILE_ELEMENTS", 400)
    monkeypatch.setattr(cpu_backend, "CHUNK_ELEMENTS", 2048)
    W, _, factors = make(128, 64, [4, 7], dtype, torch.float32)
    W, x, grad_y = W.detach(), torch.randn(9, 64).to(dtype), torch.randn(9, 128).to(dtype)
    with torch.no_grad():
        cpu.scaled_weight(ScaledWeight(W, factors, True, dtype))
        cpu.linear_by_weight(x, ScaledWeight(W, factors, True, dtype), None)
        cpu.linear_backward(grad_y, x, ScaledWeight(W, factors, True, dtype), True, True)
    chunks = [[size for size in (b.numel() for b in work._scratch.values()) if size > 400] for work in works]
    assert [len(work._scratch) - len(large) for work, large in zip(works, chunks, strict=True)] == [
        scaling,
        scaling,
        both,
    ]
    # W' and gyᵀx have one chunk between them; 64 rows or columns are the fewest
    assert chunks == [[], [64 * 64], [128 * 64]]


@pytest.mark.parametrize(("m", "n", "by_rows"), [(1024, 64, True), (64, 1024, False), (256, 256, True)])
def test_the_longer_side_is_cut_for_the_gradients_and_the_outputs_for_w(works, monkeypatch, m, n, by_rows):
    monkeypatch.setattr(cpu_backend, "CHUNK_ELEMENTS", 16384)
    for dtype, elements in ((torch.float32, 16384), (torch.bfloat16, 8192), (torch.float64, 16384)):
        W, _, factors = make(m, n, [4], dtype)
        W, x, grad_y = W.detach(), torch.randn(9, n).to(dtype), torch.randn(9, m).to(dtype)
        with torch.no_grad():
            cpu.linear_by_weight(x, ScaledWeight(W, factors, True, dtype), None)
            cpu.linear_backward(grad_y, x, ScaledWeight(W, factors, True, dtype), True, True)
        forward, backward = works[-2:]
        assert forward.scaled == list(cpu_backend._regions(m, n, True, 16384))
        assert backward.scaled == list(cpu_backend._regions(m, n, False, 16384))
        assert backward.summed == list(cpu_backend._regions(m, n, by_rows, elements))


@pytest.mark.parametrize(
    ("size", "other", "elements", "parts"),
    [
        (256, 64, 4096, [64] * 4),
        (200, 64, 4096, [64, 64, 64, 8]),
        (100, 10, 400, [64, 36]),  # of 34 rows, up to 64
        (1000, 1, 100, [128] * 7 + [104]),
        (256, 64, 1 << 23, [256]),
        (20, 1000, 4096, [20]),  # too few to be cut
        (65, 1000, 4096, [64, 1]),
        (260, 64, 4160, [128, 128, 4]),  # of 65
        (5, 0, 4096, [5]),
    ],
)
def test_parts_are_as_large_as_asked_for_and_multiples_of_64(size, other, elements, parts):
    by_rows, by_columns = (
        cpu_backend._regions(size, other, True, elements),
        cpu_backend._regions(other, size, False, elements),
    )
    ends = [sum(parts[: i + 1]) for i in range(len(parts))]
    expected = [slice(end - part, end) for end, part in zip(ends, parts, strict=True)]
    assert list(by_rows) == [(part, slice(0, other)) for part in expected]
    assert list(by_columns) == [(slice(0, other), part) for part in expected]


@pytest.mark.parametrize("transposed", [False, True])
def test_tensors_beside_the_weight_may_be_laid_out_in_any_way(transposed):
    W, _, factors = make(24, 10, [4, 3], torch.float32, fan_in_fan_out=transposed)
    W = W.detach().T if transposed else W.detach()
    product = torch.randn(24, 10)
    with torch.no_grad():
        weight = cpu.scaled_weight(ScaledWeight(W, factors, True, torch.float32))
        grads = cpu.factor_gradients(product, W, factors)
        for layout in (
            torch.zeros(24, 10),
            torch.zeros(24, 20)[:, ::2],
            torch.zeros(10, 24).T,
            torch.zeros(30, 10)[:24],
        ):
            assert cpu.scaled_weight(ScaledWeight(W, factors, True, torch.float32), layout) is layout
            assert torch.equal(layout, weight)
            torch.testing.assert_close(cpu.factor_gradients(layout.copy_(product), W, factors), grads)


@pytest.mark.parametrize("tile", [1, 64, 200])
def test_tiles_have_whole_rows_and_no_more_elements_than_asked_for(monkeypatch, tile):
    monkeypatch.setattr(tiled, "TILE_ELEMENTS", tile)
    W, _, factors = make(40, 64, [4], torch.bfloat16, torch.float32)
    work = TiledElementwise(W.detach(), factors)
    with torch.no_grad():
        work.write_scaled(torch.empty(40, 64, dtype=torch.bfloat16), slice(0, 40), slice(0, 64), True)
    assert {buffer.numel() for buffer in work._scratch.values()} == {max(tile // 64, 1) * 64}


@pytest.mark.parametrize("transposed", [False, True])
def test_a_buffer_is_made_once_for_all_that_fits_into_it(transposed):
    W, _, factors = make(8, 6, [4], torch.float32, fan_in_fan_out=transposed)
    work = TiledElementwise(W.detach().T if transposed else W.detach(), factors)
    first = work.buffer("a", 4, 6, torch.float32)
    assert first.shape == (4, 6) and first.t().is_contiguous() is transposed
    for rows, columns in ((4, 6), (2, 3), (8, 3)):
        again = work.buffer("a", rows, columns, torch.float32)
        assert again.shape == (rows, columns) and again.data_ptr() == first.data_ptr()
    others = [work.buffer("b", 4, 6, torch.float32), work.buffer("a", 4, 7, torch.float32)]
    others += [work.buffer("b", 4, 6, torch.bfloat16)]
    assert others[-1].dtype == torch.bfloat16
    assert len({first.data_ptr(), *(other.data_ptr() for other in others)}) == 4


@pytest.mark.parametrize("factor_dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gradients_of_factors_are_in_their_dtype(dtype, factor_dtype):
    W, _, factors = make(8, 6, [4, 3], dtype, factor_dtype)
    with torch.no_grad():
        pairs = cpu.factor_gradients(torch.randn(8, 6).to(dtype), W, factors)
    assert [grad.dtype for pair in pairs for grad in pair] == [factor_dtype] * 4
