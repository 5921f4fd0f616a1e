# SPDX-License-Identifier: Apache-2.0
"""The fingerprint of a mask: what its format says, and that no two masks share one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_spp.sparsity import mask_record as module
from peft_spp.sparsity import record_mask

from helpers.sparsity_tiny_models import DTYPES, pruned


# for the compiled pass and for PyTorch's operations
pytestmark = pytest.mark.usefixtures("way")


def mixed(word):
    """What the format says, in plain integers."""
    for shift, factor in ((32, 0x9E3779B97F4A7C15), (30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        word = (word ^ word >> shift) * factor % 2**64
    return word ^ word >> 31


def number(place, seed):
    return mixed(((place + 1) * 0x9E3779B97F4A7C15 + seed) % 2**64)


@pytest.mark.parametrize("shape", [(1, 1), (700, 70), (70, 700), (1100, 129), (3, 1025), (513, 8), (1, 64), (64, 1)])
@pytest.mark.parametrize("dtype", DTYPES[:4])
def test_the_fingerprint_is_the_sum_that_the_format_says(shape, dtype):
    weight = pruned(*shape, sparsity=0.6).to(dtype)
    seeds = (0x243F6A8885A308D3, 0x13198A2E03707344)
    sums = [0, 0]
    for row, values in enumerate((weight != 0).tolist()):
        words = [values[start : start + 64] for start in range(0, shape[1], 64)]
        words = [sum(1 << place for place, value in enumerate(word) if value) for word in words]
        for half, seed in enumerate(seeds):
            of_row = sum(mixed(word ^ number(index, seed)) for index, word in enumerate(words))
            sums[half] += mixed(of_row % 2**64 ^ number(row, ~seed))
    fingerprint = "mix:" + "".join(f"{value % 2**64:016x}" for value in sums)
    wide = torch.ones(shape[0], shape[1] + 5, dtype=dtype)
    wide[:, 3:-2] = weight
    for layout in (weight, weight.T.contiguous().T, wide[:, 3:-2], wide.T.contiguous().T[:, 3:-2]):
        assert record_mask(layout).fingerprint == fingerprint


@given(st.integers(1, 30), st.integers(1, 150), st.integers(0, 1000), st.data())
@settings(deadline=None, max_examples=80)
def test_any_place_that_changes_is_noticed(rows, inputs, seed, data):
    weight = pruned(rows, inputs, seed=seed)
    other = weight.clone()
    place = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, inputs - 1))
    other[place] = 1.0 if other[place] == 0 else 0.0
    assert record_mask(weight).relation_of(record_mask(other)) != "same"


def halves(weight):
    """Both halves of the fingerprint, to be looked at each for itself."""
    kind, digits = record_mask(weight).fingerprint.split(":")
    assert kind == "mix" and len(digits) == 32
    return digits[:16], digits[16:]


def assert_all_differ(fingerprints):
    """No two are alike in either half: by the birthday, many more pairs than fingerprints."""
    for half in zip(*fingerprints, strict=True):
        assert len(set(half)) == len(half)


@pytest.mark.parametrize("shape", [(5, 128), (3, 61), (40, 3)])
def test_no_two_masks_that_differ_from_one_in_a_place_agree_in_a_half(shape):
    weight = pruned(*shape)
    fingerprints = [halves(weight)]
    for place in range(weight.numel()):
        weight.view(-1)[place] = 1.0 if weight.view(-1)[place] == 0 else 0.0
        fingerprints.append(halves(weight))
        weight.view(-1)[place] = 1.0 if weight.view(-1)[place] == 0 else 0.0
    assert_all_differ(fingerprints)


@pytest.mark.parametrize("shape", [(3, 192), (12, 64), (1, 640), (9, 62)])
def test_no_two_exchanges_of_the_last_places_of_words_agree_in_a_half(shape):
    """A zero for a weight, in one word, in two of a row, and in two rows."""
    weight = pruned(*shape)
    mask = (weight != 0).float()
    last = [(row, place) for row in range(shape[0]) for place in range(shape[1]) if place % 64 >= 58]
    zeros, others = ([at for at in last if bool(mask[at] == 0) is is_zero] for is_zero in (True, False))
    fingerprints = [halves(mask)]
    for zero in zeros:
        for other in others:
            mask[zero], mask[other] = 1.0, 0.0
            fingerprints.append(halves(mask))
            mask[zero], mask[other] = 0.0, 1.0
    assert len(fingerprints) > 300
    assert_all_differ(fingerprints)


def test_many_exchanges_between_two_words_give_row_sums_of_their_own():
    # each row is a mask of its own, and differs from that of the same number below in the last places of two words
    torch.manual_seed(0)
    rows = 1 << 18
    numbers = torch.stack([module._pseudo_random(2, seed, torch.device("cpu")) for seed in module._SEEDS])
    weight = torch.randint(2, (rows, 128), dtype=torch.int8).to(torch.bfloat16)
    places = 60 + torch.randint(4, (rows, 1)), 124 + torch.randint(4, (rows, 1))
    weight.scatter_(1, places[0], 1.0).scatter_(1, places[1], 0.0)
    exchanged = weight.scatter(1, places[0], 0.0).scatter_(1, places[1], 1.0)
    sums, other_sums = (
        (module.mask_sums(w, numbers) or module._mask_sums(w, numbers))[0] for w in (weight, exchanged)
    )
    for half, other_half in zip(sums, other_sums, strict=True):
        assert len(torch.cat((half, other_half)).unique()) == 2 * rows
        assert len((half - other_half).abs_().unique()) == rows


@pytest.mark.slow
@pytest.mark.parametrize("place", [63, 62, 61, 32, 0])
def test_changes_of_a_place_do_not_cancel_each_other(place):
    # 2^26 of them, that is 2^51 pairs, each of which may cancel in two ways. With the last two rounds alone a few do.
    torch.manual_seed(place)
    words = torch.randint(-(2**63), 2**63 - 1, (1 << 26,))
    changed = module._mix_(words ^ module._signed(1 << place))
    changes = changed.sub_(module._mix_(words)).abs_().numpy()
    changes.sort()
    assert (changes[1:] != changes[:-1]).all()


def test_words_and_their_complements_are_mixed_apart():
    torch.manual_seed(0)
    words = torch.randint(-(2**63), 2**63 - 1, (100_000,))
    words = torch.cat((words, ~words, torch.arange(-1000, 1000)))
    assert len(module._mix_(words.clone()).unique()) == len(words.unique()) == 202_000


@given(st.integers(2, 30), st.integers(20, 150), st.integers(0, 1000), st.sampled_from([0.3, 0.5, 0.8]))
@settings(deadline=None, max_examples=80)
def test_masks_made_independently_have_fingerprints_of_their_own(rows, inputs, seed, sparsity):
    one, other = pruned(rows, inputs, sparsity, seed), pruned(rows, inputs, sparsity, seed + 1)
    same = torch.equal(one == 0, other == 0)
    assert (record_mask(one).fingerprint == record_mask(other).fingerprint) is same


def test_moved_rows_and_columns_are_noticed():
    weight = pruned(64, 256)
    record = record_mask(weight)
    for other in (weight.flip(0), weight.roll(64, 1), weight.roll(1, 1), weight[torch.randperm(64)]):
        assert record.relation_of(record_mask(other)) == "different"


def test_the_compiled_pass_is_taken_where_it_can_be(way):
    if way == "pytorch":
        pytest.skip("of the compiled pass alone")
    weight, numbers = pruned(70, 130), torch.zeros(2, 3, dtype=torch.int64)
    for dtype in DTYPES[:4]:
        for layout in (weight.to(dtype), weight.to(dtype).T.contiguous().T):
            assert module.mask_sums(layout, numbers) is not None
    for other in (weight.to(DTYPES[4]), weight[:, ::2], weight.T[::2].T, weight.to("meta")):
        assert module.mask_sums(other, numbers) is None


def test_numbers_of_64_bits_are_signed_where_pytorch_takes_them():
    assert [module._signed(value) for value in (0, 2**63 - 1, 2**63, 2**64 - 1)] == [0, 2**63 - 1, -(2**63), -1]
