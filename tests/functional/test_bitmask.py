# SPDX-License-Identifier: Apache-2.0
"""The format of compressed weights, in PyTorch's own operations."""

import pytest
import torch
from bitmask_cases import DTYPES, bits_of, layouts, make_weight, weights, with_strides
from hypothesis import given, settings

from peft_spp.functional import bitmask
from peft_spp.functional.bitmask import Compressed, check_compressed, compress, count_row_offsets, decompress
from peft_spp.functional.kernels.cpu import bitmask as cpu_bitmask


def by_hand(weight):
    """Bitmask, row offsets and the bits of the values, place by place."""
    rows, values, offsets = [], [], [0]
    for row in bits_of(weight).tolist():
        places = [1 << j for j, bits in enumerate(row) if bits]
        rows.append(list(sum(places).to_bytes(-(-len(row) // 64) * 8, "little")))
        values += [bits for bits in row if bits]
        offsets.append(len(values))
    return rows, offsets, values


@settings(deadline=None)
@given(weights, layouts)
def test_the_format_is_what_it_says(weight, layout):
    compressed = compress(with_strides(weight, layout))
    rows, offsets, values = by_hand(weight)
    assert compressed.bitmask.tolist() == rows and compressed.bitmask.shape == (
        len(weight),
        bitmask.bitmask_bytes(weight.shape[1]),
    )
    assert compressed.row_offsets.tolist() == offsets
    assert bits_of(compressed.values).tolist() == values
    assert compressed.shape == weight.shape


@settings(deadline=None)
@given(weights, layouts)
def test_nothing_is_lost(weight, layout):
    compressed = compress(with_strides(weight, layout))
    again = decompress(compressed)
    assert again.dtype == weight.dtype and torch.equal(bits_of(again), bits_of(weight))
    offsets = check_compressed(compressed.values, compressed.bitmask, weight.shape, "weight")
    assert torch.equal(offsets, compressed.row_offsets)
    assert torch.equal(count_row_offsets(compressed.bitmask), compressed.row_offsets)


@settings(deadline=None)
@given(weights)
def test_compressing_what_was_decompressed_gives_the_same(weight):
    compressed = compress(weight)
    again = compress(decompress(compressed))
    assert torch.equal(again.bitmask, compressed.bitmask)
    assert torch.equal(bits_of(again.values), bits_of(compressed.values))


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_does_not_matter_how_many_rows_are_looked_at_together(dtype, monkeypatch):
    weight = make_weight(37, 70, dtype, "rows", special=True)
    whole = compress(weight)
    monkeypatch.setattr(bitmask, "_CHUNK_ELEMENTS", 150)
    cut = compress(weight)
    for a, b in zip((bits_of(whole.values), *whole[1:3]), (bits_of(cut.values), *cut[1:3]), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(bits_of(decompress(cut)), bits_of(weight))
    assert torch.equal(count_row_offsets(cut.bitmask), whole.row_offsets)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_of_a_stack_is_a_view_of_it(dtype):
    stack = torch.stack([make_weight(5, 70, dtype, seed=seed) for seed in range(3)])
    compressed = compress(stack)
    assert compressed.shape == stack.shape and torch.equal(decompress(compressed), stack)
    for index, layer in enumerate(stack):
        offsets = compressed.row_offsets[5 * index : 5 * index + 6]
        assert torch.equal(decompress(Compressed(compressed.values, compressed.bitmask[index], offsets, 70)), layer)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_that_is_only_marked_as_negated_is_stored_negated(dtype):
    marked = torch._neg_view(make_weight(5, 70, dtype))
    for made in (compress(marked), cpu_bitmask.compress(marked)):
        assert torch.equal(bits_of(decompress(made)), bits_of(marked.resolve_neg()))
    assert bitmask.count_stored(marked) == bitmask.count_stored(marked.resolve_neg())


def test_what_cannot_be_compressed_is_refused():
    for weight in (torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.int32), torch.zeros(4)):
        with pytest.raises(ValueError, match="cannot compress a weight of shape"):
            compress(weight)


def test_a_bitmask_and_values_that_do_not_fit_are_refused():
    values, bits, _, _ = compress(make_weight(6, 70, torch.float32))
    check_compressed(values, bits, (6, 70), "weight")
    beyond = bits.clone()
    beyond[3, 8] |= 0x40  # column 70
    padding = bits.clone()
    padding[2, 15] = 1
    moved = bits.clone()
    moved[0, 0] ^= 1
    for wrong, match in [
        ((values.double(), bits, (6, 70)), "vector of float32"),
        ((values.view(-1, 1), bits, (6, 70)), "vector of float32"),
        ((values, bits.int(), (6, 70)), "has one of shape"),
        ((values, bits, (6, 129)), "has one of shape"),
        ((values, bits[:5], (6, 70)), "has one of shape"),
        ((values, beyond, (6, 70)), "beyond the last of 70"),
        ((values, padding, (6, 70)), "beyond the last of 70"),
        ((values, moved, (6, 70)), "bits, and there are"),
        ((values[1:], bits, (6, 70)), "bits, and there are"),
    ]:
        with pytest.raises(ValueError, match=match) as error:
            check_compressed(*wrong, "layer.weight")
        assert str(error.value).startswith("layer.weight: ")


def test_bytes_say_whether_it_is_worth_it():
    for dtype, zeros in ((torch.bfloat16, 1 / 16), (torch.float32, 1 / 32)):
        places = 128 * 640
        stored = round(places * (1 - zeros))
        assert bitmask.is_worth_it(stored - 1, (128, 640), dtype)
        assert not bitmask.is_worth_it(stored, (128, 640), dtype)
    weight = make_weight(64, 128, torch.bfloat16)
    compressed = compress(weight)
    bytes_kept = compressed.values.nbytes + compressed.bitmask.nbytes
    assert bitmask.is_worth_it(len(compressed.values), weight.shape, weight.dtype) == (bytes_kept < weight.nbytes)
