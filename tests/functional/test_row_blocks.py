# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_spp.functional import expand_row_blocks, row_block_index
from peft_spp.functional.row_blocks import refine_row_blocks, row_tiles

from helpers.reference import block_sizes


rows_and_r = st.integers(1, 60).flatmap(lambda m: st.tuples(st.just(m), st.integers(1, m)))


@given(rows_and_r)
def test_blocks_are_as_even_as_they_go(rows_r):
    rows, r = rows_r
    sizes = torch.bincount(row_block_index(rows, r), minlength=r)
    assert sizes.tolist() == block_sizes(rows, r)
    assert sizes.max() - sizes.min() <= 1
    assert (row_block_index(rows, r).diff() >= 0).all()


@given(rows_and_r)
def test_blocks_are_those_of_tensor_split(rows_r):
    rows, r = rows_r
    assert [len(part) for part in torch.arange(rows).tensor_split(r)] == block_sizes(rows, r)


@pytest.mark.parametrize(("rows", "r"), [(12, 4), (16, 16), (5, 1)])
def test_expansion_is_repeat_interleave_where_r_divides(rows, r):
    A = torch.randn(r, 3)
    assert torch.equal(expand_row_blocks(A, rows), A.repeat_interleave(rows // r, dim=0))


@given(rows_and_r)
def test_expansion_repeats_each_row_over_its_block(rows_r):
    rows, r = rows_r
    A = torch.arange(r * 2.0).view(r, 2)
    assert torch.equal(expand_row_blocks(A, rows), A[row_block_index(rows, r)])


@given(rows_and_r, st.one_of(st.none(), st.integers(1, 70)), st.data())
def test_tiles_cover_the_rows_once_in_order_and_know_their_blocks(rows_r, max_rows, data):
    rows, r = rows_r
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    index = row_block_index(rows, r)
    covered = []
    for tile in row_tiles(rows, r, slice(start, stop), max_rows):
        tile_rows = list(range(tile.rows.start, tile.rows.stop))
        covered += tile_rows
        blocks = torch.arange(tile.blocks.start, tile.blocks.stop).repeat_interleave(tile.rows_per_block)
        assert torch.equal(index[tile_rows], blocks)
        if max_rows is not None:
            assert len(tile_rows) <= max_rows
    assert covered == list(range(start, stop))


@given(rows_and_r)
def test_all_rows_are_at_most_two_tiles(rows_r):
    assert len(list(row_tiles(*rows_r))) <= 2


@pytest.mark.parametrize("r", [0, 8])
def test_impossible_splits_are_refused(r):
    with pytest.raises(ValueError, match=str(r)):
        expand_row_blocks(torch.zeros(r, 3), 7)


def test_the_index_is_on_the_device_asked_for():
    for rows in (12, 13):
        assert row_block_index(rows, 4, device="meta").device.type == "meta"


@given(rows_and_r, st.integers(1, 60), st.integers(1, 3))
def test_more_blocks_repeat_over_the_rows_as_the_blocks_did_or_are_refused(rows_r, r, layers):
    rows, own = rows_r
    A = torch.arange(layers * own * 2.0).view(layers * own, 2)
    ends = list(itertools.accumulate(block_sizes(rows, own)))
    finer = list(itertools.accumulate(block_sizes(rows, r))) if r <= rows else []
    if not set(ends) <= set(finer):
        with pytest.raises(ValueError, match=str(own if r <= rows else r)):
            refine_row_blocks(A, rows, r, layers)
        return
    refined = refine_row_blocks(A, rows, r, layers)
    assert refined.shape == (layers * r, 2)
    for before, after in zip(A.chunk(layers), refined.chunk(layers), strict=True):
        assert torch.equal(expand_row_blocks(after, rows), expand_row_blocks(before, rows))


@pytest.mark.parametrize(("rows", "own", "r"), [(16, 4, 8), (15, 5, 15), (7, 3, 7), (6, 6, 6), (48, 4, 16)])
def test_blocks_that_are_made_up_of_whole_ones_can_be_refined(rows, own, r):
    assert refine_row_blocks(torch.randn(own, 2), rows, r).shape == (r, 2)
