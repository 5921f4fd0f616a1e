# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from peft_spp.functional import scaled_weight, spp_linear
from peft_spp.functional.kernels import cpu
from peft_spp.functional.kernels.cpu import tiled

import reference
from factored import make, relative_error


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
    monkeypatch.setattr(cpu, "CHUNK_ELEMENTS", chunk)
    for expected, actual in zip(whole, [run(bias), run(None)], strict=True):
        for a, b in zip(expected, actual, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("ranks", [[7], [7, 4, 96]])
def test_chunks_keep_the_rounding_bounds(monkeypatch, dtype, bound, ranks):
    monkeypatch.setattr(tiled, "TILE_ELEMENTS", 200)
    monkeypatch.setattr(cpu, "CHUNK_ELEMENTS", 400)
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
    monkeypatch.setattr(cpu, "CHUNK_ELEMENTS", 1 << 12)
    W, bias, factors = make(256, 512, [8], dtype, torch.float32)
    x = torch.randn(100, 512, dtype=dtype, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        spp_linear(x, W.detach(), bias, factors).sum().backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    # the gradient of x is the largest there is; x in float32 would be twice that in bfloat16
    assert largest == x.numel() * x.element_size() < W.numel() * W.element_size()
