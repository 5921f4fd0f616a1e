# SPDX-License-Identifier: Apache-2.0
"""The compiled passes over compressed weights against the plain format and the passes over dense weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitmask_cases import (
    BOUNDS,
    COMPILED,
    DTYPES,
    MASKS,
    SHAPES,
    bits_of,
    compiled_only,
    layouts,
    make_factors,
    make_weight,
    weights,
    with_strides,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_spp.functional import bitmask as plain
from peft_spp.functional import merged_weight
from peft_spp.functional.bitmask import Compressed
from peft_spp.functional.factors import Factors
from peft_spp.functional.kernels.cpu import backend as cpu_backend
from peft_spp.functional.kernels.cpu import bitmask, bitmask_calls, bitmask_tokens
from peft_spp.functional.kernels.cpu.backend import cpu
from peft_spp.functional.kernels.cpu.native import NativeElementwise
from peft_spp.functional.kernels.cpu.tiled import TiledElementwise
from peft_spp.functional.kernels.scaled import ScaledWeight
from peft_spp.native import library

from helpers.factored import relative_error


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def dense_scaled(weight, factors, identity, dtype):
    """W' of the dense weight in one rounding; what is compiled for it knows no float16."""
    work = (NativeElementwise if COMPILED else TiledElementwise)(weight.float(), factors)
    out = torch.empty(weight.shape)
    work.write_scaled(out, slice(0, weight.shape[0]), slice(0, weight.shape[1]), identity)
    return out.to(dtype)


@settings(deadline=None)
@given(weights, layouts)
def test_compressing_gives_the_format(weight, layout):
    compressed, expected = bitmask.compress(with_strides(weight, layout)), plain.compress(weight)
    assert torch.equal(bits_of(compressed.values), bits_of(expected.values))
    assert torch.equal(compressed.bitmask, expected.bitmask)
    assert torch.equal(compressed.row_offsets, expected.row_offsets)
    assert compressed.columns == expected.columns
    again = bitmask.expand(compressed)
    assert again.dtype == weight.dtype and torch.equal(bits_of(again), bits_of(weight))


def test_stacks_are_compressed_and_expanded_as_such():
    stack = torch.stack([make_weight(5, 70, torch.bfloat16, seed=seed) for seed in range(3)])
    compressed = bitmask.compress(stack)
    assert compressed.shape == stack.shape
    assert torch.equal(bitmask.expand(compressed), stack.view(15, 70))
    layer = Compressed(compressed.values, compressed.bitmask[1], compressed.row_offsets[5:11], 70)
    assert torch.equal(bitmask.expand(layer), stack[1])
    factors = make_factors(5, 70, [2])
    assert torch.equal(
        cpu.compressed_weight(ScaledWeight(layer, factors, True, torch.bfloat16)),
        dense_scaled(stack[1], factors, True, torch.bfloat16),
    )
    merged = bitmask.scaled_values(layer, factors, out=compressed.values.clone())
    assert torch.equal(merged[: layer.row_offsets[0]], compressed.values[: layer.row_offsets[0]])
    assert torch.equal(merged[layer.row_offsets[-1] :], compressed.values[layer.row_offsets[-1] :])
    assert torch.equal(plain.decompress(layer._replace(values=merged)), merged_weight(stack[1], factors))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_parts_are_expanded_one_after_another(m, n, mask, dtype):
    weight = make_weight(m, n, dtype, mask, special=True)
    compressed = bitmask.compress(weight)
    rows = slice(m // 3, m)
    starts = None
    for first in range(0, n, 128):
        columns = slice(first, min(first + 128, n))
        ends = torch.full((m - m // 3,), -1)
        target = torch.full((m - m // 3, columns.stop - first + 3), 7.0, dtype=dtype)
        out = bitmask.expand(compressed, rows, columns, target[:, 1:-2], starts, ends)
        assert torch.equal(bits_of(out), bits_of(weight[rows, columns]))
        assert (target[:, 0] == 7).all() and (target[:, -2:] == 7).all()
        counted = bitmask.expand(compressed, rows, columns)
        assert torch.equal(bits_of(counted), bits_of(out))
        stored = (bits_of(weight[rows, : columns.stop]) != 0).sum(1)
        assert torch.equal(ends, compressed.row_offsets[m // 3 : m] + stored)
        starts = ends


def test_columns_that_cut_a_word_are_refused():
    compressed = bitmask.compress(make_weight(4, 200, torch.float32))
    for columns in (slice(32, 64), slice(64, 100), slice(1, 200)):
        with pytest.raises(ValueError, match="multiple of 64"):
            bitmask.expand(compressed, columns=columns)


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [[4], [130], [16, 7]])
@pytest.mark.parametrize("identity", [True, False])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_scaling_has_the_bits_of_the_dense_pass(m, n, ranks, identity, dtype, out_dtype):
    weight = make_weight(m, n, dtype)
    factors = make_factors(m, n, ranks)
    made = cpu.compressed_weight(ScaledWeight(bitmask.compress(weight), factors, identity, out_dtype))
    assert torch.equal(bits_of(made), bits_of(dense_scaled(weight, factors, identity, out_dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_without_factors_it_is_the_weight(dtype, out_dtype):
    weight, x = make_weight(70, 200, dtype), torch.randn(9, 200).to(out_dtype)
    compressed = bitmask.compress(weight)
    assert torch.equal(cpu.compressed_weight(ScaledWeight(compressed, [], True, out_dtype)), weight.to(out_dtype))
    y, expected = (
        cpu.linear_by_weight(x, ScaledWeight(compressed, [], True, out_dtype), None),
        x.double() @ weight.double().t(),
    )
    assert relative_error(y, expected) < BOUNDS[torch.bfloat16 if dtype != out_dtype else dtype]


def test_what_does_not_fit_is_refused():
    compressed = bitmask.compress(make_weight(6, 70, torch.float32))
    for out in (torch.empty(6, 69), torch.empty(70, 6).t(), torch.empty(6, 70).half()):
        with pytest.raises(ValueError, match="must have shape"):
            bitmask.expand(compressed, out=out)
    (factors,) = make_factors(6, 70, [2])
    for out in (compressed.values[1:], compressed.values.half()):
        with pytest.raises(ValueError, match="must be a contiguous vector"):
            bitmask.scaled_values(compressed, [factors], out=out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scaling_what_is_tiny_or_not_finite_is_as_in_the_dense_pass(dtype):
    weight = make_weight(24, 200, dtype, "random", special=True)
    weight[:8] = 0.0
    factors = make_factors(24, 200, [4])
    factors[0].A[1, 3], factors[0].A[2, 150], factors[0].B[20, 0] = float("nan"), float("inf"), float("-inf")
    factors[0].B[21:] = 1e-39
    made = cpu.compressed_weight(ScaledWeight(bitmask.compress(weight), factors, True, dtype))
    expected = dense_scaled(weight, factors, True, dtype)
    assert torch.equal(made.isnan(), expected.isnan())
    assert torch.equal(bits_of(made[~made.isnan()]), bits_of(expected[~expected.isnan()]))
    assert made.isnan().sum() > (weight != 0).isnan().sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_a_merge_rewrites_the_values(m, n, mask, dtype):
    weight = make_weight(m, n, dtype, mask)
    compressed, factors = bitmask.compress(weight), make_factors(m, n, [5, 3])
    expected = dense_scaled(weight, factors, True, dtype).add_(0.0)
    merged = bitmask.scaled_values(compressed, factors)
    before = compressed.values.clone()
    assert torch.equal(bits_of(plain.decompress(compressed._replace(values=merged))), bits_of(expected))
    assert torch.equal(compressed.values, before)
    assert bitmask.scaled_values(compressed, factors, out=compressed.values) is compressed.values
    assert torch.equal(compressed.values, merged)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merge_keeps_zeros_and_has_none_that_is_negative(dtype):
    weight = make_weight(16, 200, dtype)
    weight[0], weight[1, 0], weight[2, 0] = -0.0, float("inf"), float("nan")
    compressed, factors = bitmask.compress(weight), make_factors(16, 200, [4])
    # some products underflow to -0.0, and some factors are not finite
    factors[0].B[4:8] = 0.0
    weight[5, :20] = -torch.finfo(dtype).smallest_normal / 1024
    factors[0].A[0, 5] = float("inf")
    merged = plain.decompress(compressed._replace(values=bitmask.scaled_values(compressed, factors)))
    weight = plain.decompress(compressed)
    expected = dense_scaled(weight, factors, True, dtype).add_(0.0).masked_fill_(weight == 0, 0.0)
    assert torch.equal(merged.isnan(), expected.isnan()) and merged.isnan().any()
    assert torch.equal(bits_of(merged[~merged.isnan()]), bits_of(expected[~expected.isnan()]))
    assert not torch.signbit(merged[merged == 0]).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("product_dtype", DTYPES)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_gradients_are_those_of_the_dense_pass(m, n, dtype, product_dtype):
    weight, factors = make_weight(m, n, dtype), make_factors(m, n, [5, 130, 1])
    product = torch.randn(m, n).to(product_dtype)
    made = cpu.factor_gradients(product, bitmask.compress(weight), factors)
    expected = TiledElementwise(weight.double(), factors)
    expected.add_factor_gradients(product.double(), slice(0, m), slice(0, n))
    magnitude = TiledElementwise(weight.double().abs(), [Factors(A.abs(), B.abs(), s) for A, B, s in factors])
    magnitude.add_factor_gradients(product.double().abs(), slice(0, m), slice(0, n))
    made = [gradient for pair in made for gradient in pair]
    for a, b, size in zip(made, expected.factor_gradients(), magnitude.factor_gradients(), strict=True):
        assert ((a - b).abs() <= 1e-6 * size).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [100, 3000, 1 << 20])
def test_the_layer_in_chunks_has_the_bits_of_the_dense_layer(dtype, chunk, monkeypatch):
    monkeypatch.setattr(cpu_backend, "CHUNK_ELEMENTS", chunk)
    m, n, tokens = 130, 200, 12
    weight, bias, factors = make_weight(m, n, dtype), torch.randn(m).to(dtype), make_factors(m, n, [5, 3])
    x, grad_y = torch.randn(tokens, n).to(dtype), torch.randn(tokens, m).to(dtype)
    compressed = bitmask.compress(weight)
    ours, dense = (
        cpu.linear_by_weight(x, ScaledWeight(one, factors, True, dtype), bias) for one in (compressed, weight)
    )
    assert torch.equal(ours, dense)
    ours, dense = (
        cpu.linear_backward(grad_y, x, ScaledWeight(one, factors, True, dtype), True, True)
        for one in (compressed, weight)
    )
    assert torch.equal(ours[0], dense[0])
    for a, b in zip(ours[1:], dense[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


class Guarded:
    """Copies of tensors amid other memory: NaN, should it be read, and checked, should it be written."""

    MARGIN = 256

    def __init__(self):
        self.memories = []

    def copy(self, tensor):
        filler = 0xAB if tensor.dtype == torch.uint8 else 1 << 40 if tensor.dtype == torch.int64 else float("nan")
        memory = torch.full((tensor.numel() + 2 * self.MARGIN,), filler, dtype=tensor.dtype)
        self.memories.append(memory)
        return memory[self.MARGIN : self.MARGIN + tensor.numel()].view(tensor.shape).copy_(tensor)

    def compressed(self, compressed):
        return Compressed(*map(self.copy, compressed[:3]), compressed.columns)

    def assert_untouched(self):
        for memory in self.memories:
            for margin in (memory[: self.MARGIN], memory[-self.MARGIN :]):
                bits = margin.view(torch.uint8)
                assert torch.equal(bits, bits.view(-1, memory.element_size())[0].repeat(self.MARGIN))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_no_memory_beside_the_tensors_is_used_or_written(m, n, mask, dtype):
    weight = make_weight(m, n, dtype, mask)
    guarded = Guarded()
    compressed = guarded.compressed(bitmask.compress(guarded.copy(weight)))
    factors = [Factors(guarded.copy(A), guarded.copy(B), s) for A, B, s in make_factors(m, n, [5])]
    out = guarded.copy(torch.zeros(m, n, dtype=dtype))
    assert torch.equal(bitmask.expand(compressed, out=out), weight)
    cpu.compressed_weight(ScaledWeight(compressed, factors, True, dtype), out=out)
    assert torch.equal(out, dense_scaled(weight, factors, True, dtype))
    if COMPILED:
        x = guarded.copy(torch.randn(2, n).to(dtype))
        y = bitmask_tokens.few_tokens(x, compressed, guarded.copy(torch.zeros(m, dtype=dtype)), factors, True, dtype)
        assert y.isfinite().all()
        if bitmask_tokens.supports_prompt(compressed, factors, dtype):
            assert (
                bitmask_tokens.prompt(guarded.copy(x.repeat(4, 1)), compressed, None, factors, True).isfinite().all()
            )
    assert all(t.isfinite().all() for pair in cpu.factor_gradients(out, compressed, factors) for t in pair)
    bitmask.scaled_values(compressed, factors, out=compressed.values)
    assert compressed.values.isfinite().all()
    guarded.assert_untouched()


@settings(deadline=None)
@given(st.integers(2, 4), st.sampled_from(DTYPES))
def test_threads_do_not_change_a_bit(threads, dtype):
    m, n = 203, 330  # more than what one thread does alone
    weight, factors = make_weight(m, n, dtype), make_factors(m, n, [3, 100])
    x, product = torch.randn(3, n).to(dtype), torch.randn(m, n).to(dtype)

    def everything():
        compressed = bitmask.compress(weight)
        few = bitmask_tokens.few_tokens(x, compressed, None, factors, True, dtype)
        return [
            *(compressed.values, compressed.bitmask, compressed.row_offsets, bitmask.expand(compressed)),
            cpu.compressed_weight(ScaledWeight(compressed, factors, True, dtype)),
            bitmask.scaled_values(compressed, factors),
            *([] if few is None else [few]),
            *(t for pair in cpu.factor_gradients(product, compressed, factors) for t in pair),
        ]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = everything()
        torch.set_num_threads(threads)
        together = everything()
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, alone, together))


@compiled_only
def test_the_processor_and_pytorch_choose_the_kernels(monkeypatch):
    processor = library.load_library("bitmask").bitmask_tier()
    assert 0 <= bitmask_calls._TIERS.index(bitmask.tier()) <= processor <= 2
    for capability, most in (("AVX512", 2), ("AVX2", 1), ("DEFAULT", 0), ("NO AVX", 0)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert bitmask_calls._TIERS.index(bitmask_calls.tier.__wrapped__()) == min(most, processor)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"ATEN_CPU_CAPABILITY": "avx2"}, "avx2"),
        ({"ATEN_CPU_CAPABILITY": "default"}, "portable"),
        ({"PEFT_SPP_NATIVE": "0"}, "None"),
    ],
)
def test_all_of_this_on_lesser_processors(environment, expected):
    environment = {**os.environ, **environment}
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-x", "-p", "no:cacheprovider"]
    files = [str(Path(__file__).with_name(f"test_bitmask_{part}.py")) for part in ("kernels", "tokens")]
    tell = "from peft_spp.functional.kernels.cpu import bitmask; print(bitmask.tier())"
    told = subprocess.run([sys.executable, "-c", tell], env=environment, capture_output=True, text=True, check=True)
    best = {"avx2": ("avx2", "portable")}.get(expected, (expected,))
    assert told.stdout.split()[-1] in best
    result = subprocess.run([*command, *files], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
