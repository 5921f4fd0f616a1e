# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_spp.sparsity import NMPattern, satisfies_n_m
from peft_spp.sparsity.bits import FORMATS, look_at
from peft_spp.sparsity.counting import count
from peft_spp.sparsity.pattern import fullest_group


GROUP_SIZES = (1, 2, 3, 4, 5, 8, 16)


def fullest_by_hand(rows: list[list[float]], m: int) -> int:
    groups = (row[start : start + m] for row in rows for start in range(0, len(row), m))
    return max((sum(1 for value in group if value != 0) for group in groups), default=0)


@st.composite
def weights(draw: st.DrawFn) -> list[list[float]]:
    rows, inputs = draw(st.integers(1, 4)), draw(st.integers(1, 37))
    value = st.sampled_from([0.0, 0.0, -0.0, 1.5, -2.0, float("nan"), float("inf")])
    return [draw(st.lists(value, min_size=inputs, max_size=inputs)) for _ in range(rows)]


@given(weights(), st.sampled_from(GROUP_SIZES), st.data())
@settings(max_examples=150, deadline=None)
def test_agrees_with_counting_by_hand(rows, m, data):
    n = data.draw(st.integers(1, m))
    expected = fullest_by_hand(rows, m) <= n
    for dtype in (torch.float32, torch.bfloat16):
        assert satisfies_n_m(torch.tensor(rows, dtype=dtype), NMPattern(n, m)) is expected


@given(weights(), st.booleans(), st.integers(1, 64))
@settings(max_examples=100, deadline=None)
def test_counts_agree_with_counting_by_hand_in_either_layout_and_any_chunk(rows, transposed, chunk):
    weight = torch.tensor(rows, dtype=torch.float16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peft_spp.sparsity.counting.CHUNK_ELEMENTS", chunk)
        counts = count(weight.T.contiguous() if transposed else weight, transposed=transposed, group_sizes=GROUP_SIZES)
    flat = [value for row in rows for value in row]
    assert counts.zeros == sum(value == 0 for value in flat)
    assert counts.negative_zeros == sum(value == 0 and str(value) == "-0.0" for value in flat)
    assert counts.non_finite == sum(value != value or value == float("inf") for value in flat)
    assert counts.fullest == {m: fullest_by_hand(rows, m) for m in GROUP_SIZES}


@given(weights())
@settings(max_examples=50, deadline=None)
def test_tighter_patterns_imply_looser_ones(rows):
    weight = torch.tensor(rows)
    assert not satisfies_n_m(weight, "2:8") or satisfies_n_m(weight, "2:4")
    assert not satisfies_n_m(weight, "2:4") or satisfies_n_m(weight, "4:8")
    assert satisfies_n_m(weight, "4:4")


def test_the_incomplete_last_group_is_held_to_n():
    row = torch.tensor([[1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0]])
    assert satisfies_n_m(row, "2:4")
    row[0, 6] = 1.0
    assert not satisfies_n_m(row, "2:4")


def test_a_slice_is_read_as_well_as_a_whole():
    weight = torch.ones(3, 9)
    weight[:, 1::2] = 0
    assert satisfies_n_m(weight[1:, 1:], "2:4")
    assert satisfies_n_m(weight.T[:, :], "3:3")


def test_weights_are_read_in_chunks(monkeypatch):
    monkeypatch.setattr("peft_spp.sparsity.pattern.CHUNK_ELEMENTS", 8)
    weight = torch.zeros(9, 4)
    weight[8] = 1.0
    assert not satisfies_n_m(weight, "2:4")
    assert satisfies_n_m(weight[:8], "2:4")


@pytest.mark.parametrize("text", ["", "2", "2:", ":4", "a:b", "2-4", "-2:4", "0:4", "5:4", "2:0", "1.5:4", None, 24])
def test_malformed_patterns_are_refused_by_name(text):
    with pytest.raises(ValueError, match="N:M"):
        NMPattern.parse(text)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (-1, 4), (1.0, 4), (True, 4)])
def test_impossible_patterns_are_refused(n, m):
    with pytest.raises(ValueError, match="N:M"):
        NMPattern(n, m)


def test_a_pattern_reads_and_writes_itself():
    pattern = NMPattern.parse(" 2:4 ")
    assert (pattern, str(pattern), NMPattern.parse(pattern)) == (NMPattern(2, 4), "2:4", pattern)
    assert len({pattern, NMPattern(2, 4)}) == 1


@pytest.mark.parametrize("weight", [torch.zeros(4), torch.zeros(2, 2, 2), torch.zeros(2, 4, dtype=torch.int32)])
def test_what_is_no_floating_matrix_is_refused(weight):
    with pytest.raises(ValueError):
        satisfies_n_m(weight, "2:4")


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_an_empty_weight_holds_every_pattern(shape):
    assert satisfies_n_m(torch.zeros(shape), "1:4")
    assert [fullest_group(torch.zeros(shape, dtype=torch.bool), m) for m in GROUP_SIZES] == [0] * len(GROUP_SIZES)
    look = look_at(torch.zeros(shape))
    assert (look.nonzero.shape, look.negative_zeros, look.non_finite) == (shape, 0, 0)


@pytest.mark.parametrize("start", range(9))
def test_booleans_may_start_anywhere(start):
    several = torch.tensor([i % 3 != 0 for i in range(start + 32)])[start:].view(2, 16)
    expected = [fullest_by_hand(several.tolist(), m) for m in GROUP_SIZES]
    assert [fullest_group(several, m) for m in GROUP_SIZES] == expected


def test_a_single_weight_is_a_group():
    assert fullest_group(torch.tensor([[True]]), 4) == 1


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_bits_of_every_dtype_agree_with_its_values(dtype):
    size = torch.empty(0, dtype=dtype).element_size()
    if size == 1:
        every = torch.arange(-128, 128).to(torch.int8).view(dtype)
    else:
        values = [0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), float("nan"), torch.finfo(dtype).tiny]
        values += [torch.finfo(dtype).max, torch.finfo(dtype).min, torch.finfo(dtype).smallest_normal / 2]
        every = torch.tensor(values, dtype=torch.float64).to(dtype)
    values64 = every.to(torch.float64)
    look = look_at(every)
    assert torch.equal(look.nonzero, values64 != 0)
    assert look.non_finite == int((~values64.isfinite()).sum())
    assert look.negative_zeros == int(((values64 == 0) & values64.signbit()).sum())


def test_a_subnormal_number_is_not_zero():
    weight = torch.full((1, 4), 1e-45)
    assert int(look_at(weight).nonzero.sum()) == 4
