# SPDX-License-Identifier: Apache-2.0
"""The record of a mask: what it holds, what it does not depend on, and how two are compared."""

import base64
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_spp.functional.compressed import compress
from peft_spp.sparsity import MaskRecord, record_mask, sparsity_report
from peft_spp.sparsity import mask_record as module
from peft_spp.sparsity.mask_record import record_rows

from helpers.sparsity_tiny_models import DTYPES, keep_n_m, pruned


# for the compiled pass and for PyTorch's operations
pytestmark = pytest.mark.usefixtures("way")


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
