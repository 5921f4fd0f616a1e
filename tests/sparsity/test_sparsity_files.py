# SPDX-License-Identifier: Apache-2.0
import json
import os
import re
import struct
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_spp.checkpoints import safetensors_files
from peft_spp.checkpoints.safetensors_files import checked_shape, read_json
from peft_spp.inspection import inspect_checkpoint
from peft_spp.sparsity import compare_sparsity, sparsity_report

from helpers.sparsity_tiny_models import keep_n_m


@pytest.fixture
def shards(tmp_path):
    """A sharded folder of eight weights in two files, and its index."""
    weight_map = {}
    for shard in range(2):
        state = {f"layers.{shard * 4 + n}.fc.weight": keep_n_m(torch.randn(8, 8), 2, 4) for n in range(4)}
        name = f"model-{shard + 1:05}-of-00002.safetensors"
        save_file(state, tmp_path / name)
        weight_map |= dict.fromkeys(state, name)
    write_index(tmp_path, weight_map)
    return tmp_path, weight_map


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def naming(culprit: object):
    return pytest.raises(ValueError, match=re.escape(str(culprit)))


def test_layers_come_in_the_order_of_their_numbers(tmp_path):
    save_file({f"layers.{n}.fc.weight": torch.ones(2, 2) for n in (10, 9, 1)}, tmp_path / "model.safetensors")
    assert list(sparsity_report(tmp_path).modules) == ["layers.1.fc", "layers.9.fc", "layers.10.fc"]


def test_names_come_before_numbers(tmp_path):
    save_file({f"h.{part}.fc.weight": torch.ones(2, 2) for part in ("2", "0", "b", "a")}, tmp_path / "a.safetensors")
    assert list(sparsity_report(tmp_path).modules) == ["h.a.fc", "h.b.fc", "h.0.fc", "h.2.fc"]


def test_a_path_may_be_a_string_and_is_told(shards):
    report = sparsity_report(str(shards[0]))
    assert report.all_satisfy("2:4") and report.source == str(shards[0])


def test_of_a_shard_all_is_read_whether_or_not_the_index_names_it(shards):
    """As Transformers does, which takes from the index only which shards there are."""
    folder, weight_map = shards
    before = folder / "before.safetensors"
    save_file({"layers.5.fc.weight": keep_n_m(torch.randn(8, 8), 2, 4)}, before)
    shard = folder / weight_map.pop("layers.5.fc.weight")
    write_index(folder, weight_map)
    assert list(sparsity_report(folder).modules) == [f"layers.{n}.fc" for n in range(8)]
    save_file(load_file(shard) | {"layers.5.fc.weight": torch.ones(8, 8)}, shard)
    comparison = compare_sparsity(before, folder)
    assert not comparison.kept and comparison["layers.5.fc"].lost == 32


def test_a_name_in_config_json_is_the_one_that_is_read(shards):
    folder, _ = shards
    save_file({"fc.weight": torch.ones(2, 2)}, folder / "other.safetensors")
    (folder / "config.json").write_text('{"transformers_weights": "other.safetensors"}')
    assert list(sparsity_report(folder).modules) == ["fc"]
    (folder / "config.json").write_text('{"transformers_weights": "../other.safetensors"}')
    with naming("../other.safetensors"):
        sparsity_report(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_safetensors_next_to_pickled_weights_that_transformers_loads_are_not_read_for_them(tmp_path, name):
    save_file({"fc.weight": torch.ones(2, 2)}, tmp_path / "consolidated.safetensors")
    assert len(sparsity_report(tmp_path)) == 1
    (tmp_path / name).write_text("{}")
    with naming(name):
        sparsity_report(tmp_path)


@pytest.mark.parametrize("text", ['{"weight_map": %s, "n": NaN}', '{"weight_map": %s, "weight_map": {}}'])
def test_an_index_is_read_as_strict_json(shards, text):
    folder, weight_map = shards
    (folder / "model.safetensors.index.json").write_text(text % json.dumps(weight_map))
    with naming(folder / "model.safetensors.index.json"):
        sparsity_report(folder)


@pytest.mark.parametrize("drive", ["c:", "C:", "z:", "Z:"])
def test_an_index_that_names_a_drive_is_refused_everywhere(shards, drive):
    folder, weight_map = shards
    shard = weight_map["layers.0.fc.weight"]
    (folder / shard).rename(folder / f"{drive}{shard}")  # a file like any other, but not on Windows
    write_index(folder, {name: f"{drive}{where}" if where == shard else where for name, where in weight_map.items()})
    with naming(repr(f"{drive}{shard}")):
        sparsity_report(folder)


def test_links_out_of_the_folder_are_followed(shards, tmp_path_factory):
    """The download cache of the Hub keeps its files elsewhere."""
    folder, _ = shards
    snapshot = tmp_path_factory.mktemp("snapshot")
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert len(sparsity_report(snapshot)) == 8


@pytest.mark.parametrize(
    "where", ["../elsewhere.safetensors", "a/../../b.safetensors", "/etc/passwd", "C:\\w", "..\\w"]
)
def test_an_index_that_leads_out_of_the_folder_is_refused(shards, where):
    folder, weight_map = shards
    save_file({"layers.0.fc.weight": torch.ones(2, 2)}, folder.parent / "elsewhere.safetensors")
    write_index(folder, weight_map | {"layers.0.fc.weight": where})
    with naming(repr(where)):
        sparsity_report(folder)


def test_an_index_that_names_what_is_not_there_is_refused(shards):
    folder, weight_map = shards
    shard = weight_map["layers.0.fc.weight"]
    write_index(folder, weight_map | {"layers.99.fc.weight": shard})
    with naming("layers.99.fc.weight") as error:
        sparsity_report(folder)
    # it is the index that is wrong, the file is as it should be
    assert str(folder / shard) in str(error.value) and error.value.__cause__ is None
    write_index(folder, weight_map)
    (folder / shard).unlink()
    with naming(shard):
        sparsity_report(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": []}', "\x00"])
def test_a_damaged_index_is_refused_by_name(shards, text):
    index = shards[0] / "model.safetensors.index.json"
    index.write_text(text)
    with naming(index):
        sparsity_report(shards[0])


def test_a_damaged_config_is_refused_by_name(shards):
    (shards[0] / "config.json").write_bytes(b"\xff\xfe{")
    with naming("config.json"):
        sparsity_report(shards[0])


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_file_cut_short_is_refused_by_name(shards, keep):
    folder, weight_map = shards
    file = folder / weight_map["layers.7.fc.weight"]
    content = file.read_bytes()
    file.write_bytes(content[:keep])
    for source in (folder, file):
        with naming(file):
            sparsity_report(source)
    with naming(file):
        compare_sparsity(folder, folder)


@pytest.mark.parametrize(
    "content", [b"\xff" * 64, struct.pack("<Q", 8) + b"not json", struct.pack("<Q", 2**40) + b"{}", b"PK\x03\x04" * 9]
)
def test_a_damaged_file_is_refused_by_name(tmp_path, content):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with naming(file):
        sparsity_report(tmp_path)


def test_a_tensor_in_two_files_is_refused_by_name(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"fc.weight": torch.ones(2, 2)}, tmp_path / name)
    with naming("fc.weight") as error:
        sparsity_report(tmp_path)
    assert "a.safetensors" in str(error.value) and "b.safetensors" in str(error.value)


def test_a_header_that_lies_about_a_shape_is_refused_by_name(tmp_path):
    header = json.dumps({"fc.weight": {"dtype": "F32", "shape": [0, 2**62, 2], "data_offsets": [0, 0]}}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    with naming(file) as error:
        sparsity_report(tmp_path)
    assert "'fc.weight'" in str(error.value)


def test_a_dtype_that_cannot_be_read_is_told(tmp_path):
    state = {"a.weight": torch.ones(2, 2, dtype=torch.uint8), "b.weight": torch.ones(2, 2, dtype=torch.bool)}
    save_file(state, tmp_path / "model.safetensors")
    assert sparsity_report(tmp_path).skipped == {"a": "unreadable: U8", "b": "unreadable: BOOL"}


def test_only_safetensors_is_read(tmp_path):
    with naming(tmp_path):
        sparsity_report(tmp_path)
    pickled = tmp_path / "pytorch_model.bin"
    torch.save({"fc.weight": torch.ones(2, 2)}, pickled)
    for source in (tmp_path, pickled):
        with naming(tmp_path) as error:
            sparsity_report(source)
        assert "safetensors" in str(error.value) and "pytorch_model.bin" in str(error.value)
    with pytest.raises(FileNotFoundError, match="no-such-folder"):
        sparsity_report(tmp_path / "no-such-folder")


@pytest.fixture
def watched(monkeypatch):
    """The number of earlier tensors still alive, and the resident memory, at each read of a tensor."""
    alive, resident, seen = [], [], []
    load = safetensors_files.load_tensor

    def watching(*where):
        alive.append(sum(one() is not None for one in seen))
        if os.path.exists("/proc/self/statm"):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident.append(pages * os.sysconf("SC_PAGE_SIZE"))
        tensor = load(*where)
        seen.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(safetensors_files, "load_tensor", watching)
    return alive, resident


def test_a_report_holds_one_tensor_at_a_time(shards, watched):
    sparsity_report(shards[0])
    assert watched[0] == [0] * 8


def test_a_comparison_holds_one_tensor_of_each(shards, watched):
    compare_sparsity(shards[0], shards[0])
    assert watched[0] == [0, 1] * 8


def test_memory_does_not_grow_with_the_checkpoint(tmp_path, watched):
    size, count = 8 * 2**20, 20
    weight = torch.ones(2048, size // 2048 // 2, dtype=torch.bfloat16)
    for shard in range(2):
        state = {f"layers.{shard}.{n}.fc.weight": weight.clone() for n in range(count // 2)}
        save_file(state, tmp_path / f"model-{shard}.safetensors")
        del state
    report = sparsity_report(tmp_path)
    assert report.numel * 2 == size * count
    resident = watched[1]
    if not resident:
        pytest.skip("resident memory is told on Linux only")
    assert max(resident) - resident[0] < 64 * 2**20 < size * count // 2


def test_the_header_of_a_file_is_read_once_and_not_for_each_tensor(tmp_path, monkeypatch):
    tensors = {f"layers.{n}.fc.weight": torch.eye(4) for n in range(200)}
    save_file(tensors, tmp_path / "model.safetensors")
    opened = []
    open_file = safetensors_files.open_safetensors
    monkeypatch.setattr(safetensors_files, "open_safetensors", lambda *a, **k: opened.append(a) or open_file(*a, **k))
    for read in (sparsity_report, inspect_checkpoint):
        opened.clear()
        report = read(tmp_path)
        assert len(report) == 200 and report.zeros == 200 * 12 and len(opened) == 1


def test_strict_json_refuses_what_json_does_not_have(tmp_path):
    file = tmp_path / "a.json"
    for text, culprit in (
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "Infinity"),
        ('{"a": {"k": 1, "j": 2, "k": 3}}', "'k'"),
    ):
        file.write_text(text)
        assert set(read_json(file)) == {"a"}
        with pytest.raises(ValueError, match=culprit) as raised:
            read_json(file, strict=True)
        assert str(file) in str(raised.value)
    file.write_text('{"é": [1, 2.5, null]}', encoding="utf-8")
    assert read_json(file) == read_json(file, strict=True) == {"é": [1, 2.5, None]}


def test_shapes_that_cannot_be_counted_to_are_refused(tmp_path):
    for shape in ((), (0,), (3, 4), (0, 2**62), (2**31, 2**31), (2**63 - 1, 0, 1)):
        assert checked_shape(tmp_path, "w", list(shape)) == shape
    for shape in ((2**63,), (0, 2**62, 2), (2**32, 2**31)):
        with pytest.raises(ValueError, match="'w'"):
            checked_shape(tmp_path, "w", shape)
