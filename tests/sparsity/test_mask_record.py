# SPDX-License-Identifier: Apache-2.0
import base64
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_spp.functional.compressed import compress
from peft_spp.native.library import load_library
from peft_spp.sparsity import MaskRecord, record_mask, sparsity_report
from peft_spp.sparsity import mask_record as module
from peft_spp.sparsity.mask_record import record_rows

from helpers.sparsity_tiny_models import keep_n_m


@pytest.fixture(autouse=True, scope="module", params=["native", "pytorch"])
def way(request):
    """Everything here holds for the compiled pass and for PyTorch's operations."""
    if request.param == "native" and load_library() is None:
        pytest.skip("no C++ compiler that works with this PyTorch")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "pytorch":
            patch.setattr(module, "mask_sums", lambda *_: None)
        yield request.param


def pruned(rows, inputs, sparsity=0.5, seed=0):
    torch.manual_seed(seed)
    weight = torch.randn(rows, inputs)
    weight[torch.rand(rows, inputs) < sparsity] = 0.0
    return weight


@given(st.integers(1, 40), st.integers(1, 200), st.sampled_from([0.0, 0.5, 0.9, 1.0]), st.integers(0, 100))
@settings(deadline=None, max_examples=60)
def test_a_record_says_what_the_report_says(rows, inputs, sparsity, seed):
    weight = pruned(rows, inputs, sparsity, seed)
    record = record_mask(weight)
    report = sparsity_report({"layer.weight": weight}, modules=["layer"])["layer"]
    assert (record.shape, record.zeros, record.pattern) == (report.shape, report.zeros, report.pattern)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (2, 8)])
def test_patterns(n, m):
    assert record_mask(keep_n_m(torch.randn(6, 32), n, m)).pattern == f"{n}:{m}"


@pytest.mark.parametrize("group", range(4))
def test_one_group_with_a_weight_too_many_is_no_pattern(group):
    weight = keep_n_m(torch.randn(1, 16), 2, 4)
    weight[0, 4 * group : 4 * group + 4] = torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert record_mask(weight).pattern == "unstructured"


def test_the_mask_alone_counts(monkeypatch):
    weight = pruned(70, 130)
    record = record_mask(weight)
    others = [
        weight * -3.0,  # also turns zeros into -0.0
        weight.double(),
        weight.to(torch.bfloat16),
        weight.T.contiguous().T,
        torch.stack([weight, weight], 2)[..., 0],
    ]
    for other in others:
        assert record_mask(other) == record
    monkeypatch.setattr(module, "_PIECE_ELEMENTS", {"cpu": 300})
    for other in (weight, *others):
        assert record_mask(other) == record


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_are_told_from_all_other_values_of_a_dtype(dtype):
    info = torch.finfo(dtype)
    values = [0.0, -0.0, info.max, info.min, info.smallest_normal, -info.smallest_normal, float("nan"), 1.0]
    values = [*values, info.smallest_normal * info.eps, 0.0]  # the smallest number that is not zero
    weight = torch.tensor(values * 30, dtype=torch.float64).view(20, 15).to(dtype)
    expected = record_mask((weight.double() != 0).float())
    assert expected.zeros == 90
    assert record_mask(weight) == expected
    assert record_mask(weight.T.contiguous().T) == expected


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


def test_views_that_repeat_rows_or_columns():
    weight = pruned(70, 130)
    for view in (weight[:1].expand(70, 130), weight[:, :1].expand(70, 130)):
        assert record_mask(view) == record_mask(view.clone(memory_format=torch.contiguous_format))


@given(st.integers(1, 40), st.integers(1, 200), st.integers(0, 1000), st.sampled_from([64, 1000, 1 << 20]))
@settings(deadline=None, max_examples=40)
def test_the_layout_in_memory_does_not_count(rows, inputs, seed, piece):
    weight = pruned(rows, inputs, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE_ELEMENTS", {"cpu": piece})
        assert record_mask(weight.T.contiguous().T) == record_mask(weight)


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


def test_relations():
    weight = pruned(64, 64)
    record = record_mask(weight)
    more = weight.clone()
    more[torch.rand(64, 64) < 0.1] = 0.0
    elsewhere = pruned(64, 64, seed=1)
    assert record.relation_of(record_mask(weight * 2)) == "same"
    assert record.relation_of(record_mask(more)) == "refined"
    assert record_mask(more).relation_of(record) == "different"  # places that were zero are not
    assert record.relation_of(record_mask(elsewhere)) == "different"
    assert record.relation_of(record_mask(torch.randn(64, 64))) == "different"
    assert record.relation_of(record_mask(pruned(64, 65))) == "different"
    dense = record_mask(torch.randn(64, 64))
    assert dense.relation_of(record) == "refined"


def test_a_small_weight_is_sampled_whole():
    weight = pruned(16, 64)  # as many places as samples
    record = record_mask(weight)
    for row, column in ((weight == 0).nonzero()[::40]).tolist():
        other = weight.clone()
        other[row, column] = 1.0
        other[(other != 0).nonzero(as_tuple=True)[0][0]] = 0.0  # and more zeros elsewhere
        other[row, column] = 1.0
        assert record.relation_of(record_mask(other)) == "different"


def test_samples_are_spread_over_the_whole_weight():
    weight = torch.ones(128, 512)
    numel = weight.numel()
    for part in range(8):  # an eighth of the places is an eighth of the samples
        weight.fill_(1.0).view(-1)[part * numel // 8 : (part + 1) * numel // 8] = 0.0
        bits = int.from_bytes(base64.b64decode(record_mask(weight).sample), "little").bit_count()
        assert abs(bits - module.SAMPLES / 8) <= 2


def test_the_format_is_kept():
    # adapters on disk hold these: the same mask must have the same record for ever
    weight = (torch.arange(12 * 100).view(12, 100) % 3 != 0).float()
    record = record_mask(weight)
    assert record == MaskRecord.from_dict(json.loads(json.dumps(record.to_dict())))
    assert (record.zeros, record.pattern) == (400, "unstructured")
    assert record.fingerprint == "mix:875824182be949a169d50ec529175714"
    assert record.sample.startswith("Y4QYIcaIMWKMGCPGiDFCjBBjxBgxRowRY8QYIUaIMWKM")


def test_empty_weights():
    for shape in ((0, 5), (5, 0)):
        record = record_mask(torch.zeros(shape))
        assert (record.zeros, record.sample) == (0, "")


@pytest.mark.parametrize(
    ("weight", "why"), [(torch.zeros(3), r"\(3,\)"), (torch.zeros(2, 2, device="meta"), "meta device")]
)
def test_what_cannot_be_recorded_is_refused(weight, why):
    with pytest.raises(ValueError, match=why):
        record_mask(weight)


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


@pytest.mark.parametrize(
    "change",
    [
        *({"shape": shape} for shape in (None, "ab", [1], [1, 2, 3], [1, -1], [-1, 1], [4, 8.0], ["4", 8])),
        *({"zeros": zeros} for zeros in ("1", None, 1.0, -1, 33)),
        *({name: value} for name in ("pattern", "fingerprint", "sample") for value in (None, 1)),
        *({"sample": sample} for sample in ("%", "AAA=", "AAAAAAA=", "")),
    ],
)
def test_a_malformed_record_is_refused(change):
    data = record_mask(pruned(4, 8)).to_dict()
    (name,) = change
    with pytest.raises(ValueError, match=name):
        MaskRecord.from_dict({**data, **change})
    del data[name]
    with pytest.raises(ValueError, match=name):
        MaskRecord.from_dict(data)


def test_a_sample_is_read_strictly():
    data = record_mask(pruned(4, 8)).to_dict()
    with pytest.raises(ValueError, match="sample"):
        MaskRecord.from_dict({**data, "sample": f"{data['sample'][:2]}%{data['sample'][2:]}"})


@pytest.mark.parametrize("shape", [(4, 8), (4, 9), (1, 1), (32, 32), (32, 33), (0, 5), (5, 0)])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_record_is_plain_data_and_comes_back(shape, value):
    record = record_mask(torch.full(shape, value))
    data = record.to_dict()
    assert set(data) == {"shape", "zeros", "pattern", "fingerprint", "sample"}
    assert data["shape"] == list(shape) and data["zeros"] == (0 if value else shape[0] * shape[1])
    assert MaskRecord.from_dict(json.loads(json.dumps(data))) == record
    assert MaskRecord.from_dict({**data, "shape": shape, "more": 1}) == record
    assert record.sparsity == (0.0 if value or 0 in shape else 1.0)


def test_sparsity_is_the_share_of_zeros():
    weight = torch.ones(4, 8)
    weight[0, :3] = 0.0
    assert record_mask(weight).sparsity == 3 / 32


@pytest.mark.parametrize("shape", [(1, 5), (3, 7), (32, 32)])
def test_up_to_as_many_places_as_samples_each_has_its_bit(shape):
    weight = pruned(*shape)
    bits = int.from_bytes(base64.b64decode(record_mask(weight).sample), "little")
    assert [bits >> place & 1 for place in range(weight.numel())] == (weight == 0).flatten().int().tolist()
    assert bits >> weight.numel() == 0


def test_refined_needs_more_zeros_and_each_that_was_there():
    def record(zeros, sampled, fingerprint):
        return MaskRecord((2, 8), zeros, "unstructured", fingerprint, base64.b64encode(bytes(sampled)).decode())

    then = record(5, [0b11, 0b1], "0")
    assert then.relation_of(record(6, [0b11, 0b1], "1")) == "refined"  # the new one is not among the samples
    assert then.relation_of(record(6, [0b111, 0b1], "1")) == "refined"
    assert then.relation_of(record(6, [0b11, 0b10], "1")) == "different"
    assert then.relation_of(record(5, [0b11, 0b1], "1")) == "different"
    assert then.relation_of(record(4, [0b11, 0b1], "1")) == "different"
    assert then.relation_of(record(5, [0b11, 0b1], "0")) == "same"
    assert then.relation_of(MaskRecord((8, 2), 6, "unstructured", "0", then.sample)) == "different"


def test_a_parameter_is_recorded_without_a_graph():
    weight = pruned(4, 8)
    assert record_mask(torch.nn.Parameter(weight)) == record_mask(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 70), (64, 64), (33, 4100), (2050, 65), (3, 0), (0, 8)])
def test_a_compressed_weight_has_the_record_of_the_dense_one(shape, dtype):
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    weight[torch.rand(shape) < 0.5] = 0.0
    assert record_mask(compress(weight)) == record_mask(weight)
    if weight.numel():
        weight.view(-1)[-1] = -0.0  # it is stored, and counts as zero
        assert record_mask(compress(weight)) == record_mask(weight)
        weight.view(-1)[-1] = float("nan")
        assert record_mask(compress(weight)) == record_mask(weight)


def test_the_bitmask_alone_is_read(monkeypatch):
    compressed = compress(torch.ones(4, 64))
    monkeypatch.setattr("peft_spp.sparsity.mask_record.decompress", None)
    assert record_mask(compressed).zeros == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_that_come_piece_by_piece_are_recorded_as_a_whole_weight_is(dtype):
    torch.manual_seed(0)
    weight = torch.randn(90, 130).to(dtype)
    weight[torch.rand(90, 130) < 0.4] = 0
    for pieces in (weight.split(90), weight.split(1), weight.split([50, 3, 37]), weight.t().contiguous().t().split(7)):
        assert record_rows((90, 130), pieces) == record_mask(weight)
    other = weight.clone()
    other[77, 5] = 0 if other[77, 5] else 1
    assert record_rows((90, 130), other.split(40)) != record_mask(weight)
    for pieces in (weight[:89].split(40), torch.cat([weight, weight[:1]]).split(40), weight[:, :129].split(40)):
        with pytest.raises(ValueError, match=r"\(90, 130\)"):
            record_rows((90, 130), pieces)
