# SPDX-License-Identifier: Apache-2.0
"""What is in the output folder after a merge, where it may be, and what memory it takes to fill it."""

import os
import sys

import pytest
import torch
from safetensors.torch import save_file

from peft_spp import SPPConfig
from peft_spp.checkpoints import hub
from peft_spp.merge import merge_checkpoint

from helpers.merge_cases import contents, edit_json, hidden, llama_case, names, run_python


def test_an_old_model_is_replaced_as_a_whole(tmp_path, case, old_model):
    merge_checkpoint(case.base, case.adapter, old_model, overwrite=True)
    assert names(old_model) == names(case.base)
    assert hidden(tmp_path) == []


def test_an_old_model_is_whole_until_the_new_one_is(case, old_model):
    before = contents(old_model)
    seen = []
    merge_checkpoint(
        case.base, case.adapter, old_model, overwrite=True, progress=lambda *_: seen.append(contents(old_model))
    )
    assert seen and all(one == before for one in seen)


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path, case):
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "a" / "b"):
        merge_checkpoint(case.base, case.adapter, out)
        assert names(out) == names(case.base)


def test_a_linked_folder_is_written_where_it_is(tmp_path, case):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    merge_checkpoint(case.base, case.adapter, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and names(tmp_path / "elsewhere") == names(case.base)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_permissions_are_those_of_new_files(tmp_path, case):
    mask = os.umask(0o027)
    try:
        merge_checkpoint(case.base, case.adapter, tmp_path / "out")
    finally:
        os.umask(mask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {0o640}


def test_what_belongs_to_the_model_is_carried_over(tmp_path, case):
    belongs = ["tokenizer.json", "tokenizer.model", "chat_template.jinja", "modeling.py", "1_Pooling/config.json"]
    left_out = ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf", "onnx/model.onnx", "original/w.pth"]
    left_out += ["consolidated.safetensors", "checkpoint-5/model.safetensors", "adapter_config.json"]
    ignored = [".gitattributes", ".cache/huggingface/x", "__pycache__/modeling.pyc"]
    for name in (*belongs, *left_out, *ignored):
        (case.base / name).parent.mkdir(parents=True, exist_ok=True)
        (case.base / name).write_text(name)
    report = merge_checkpoint(case.base, case.adapter, tmp_path / "out")
    config = {"config.json", "generation_config.json", "model.safetensors.index.json"}
    assert set(report.carried) == config | set(belongs)
    assert set(report.left_out) == set(left_out)
    assert names(tmp_path / "out") == set(report.carried) | set(report.files)
    assert report.left_out[0] in str(report)


def test_a_single_file_hides_an_index_beside_it(tmp_path):
    case = llama_case(tmp_path)
    (case.base / "model.safetensors.index.json").write_text("{}")
    report = merge_checkpoint(case.base, case.adapter, tmp_path / "out")
    assert "model.safetensors.index.json" in report.left_out


def test_a_download_cache_of_links_is_read_and_not_copied_as_links(tmp_path, case):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in case.base.iterdir():
        (snapshot / file.name).symlink_to(file)
    (snapshot / "broken.txt").symlink_to(tmp_path / "nowhere")
    merge_checkpoint(snapshot, case.adapter, tmp_path / "out")
    assert names(tmp_path / "out") == names(case.base)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_models_are_downloaded_from_the_hub(tmp_path, case, monkeypatch):
    (tmp_path / "repo").mkdir()
    case.adapter.rename(tmp_path / "repo" / "sub")
    edit_json(tmp_path / "repo" / "sub" / "adapter_config.json", base_model_name_or_path="me/base", revision="v2")
    asked = {}

    def download(repo_id, *, revision, allow_patterns, ignore_patterns):
        asked[repo_id] = (revision, allow_patterns, ignore_patterns)
        return str({"me/base": case.base, "me/adapter": tmp_path / "repo"}[repo_id])

    monkeypatch.setattr(hub, "snapshot_download", download)
    merge_checkpoint(None, "me/adapter", tmp_path / "out", adapter_subfolder="sub")
    assert names(tmp_path / "out") == names(case.base)
    assert asked["me/base"][0] == "v2" and "*.bin" in asked["me/base"][2]
    files = ["sub/adapter_config.json", "sub/base_masks.json", "sub/adapter_model.safetensors"]
    assert asked["me/adapter"] == (None, files, None)


PEAK_MEMORY = """
import re, sys
from pathlib import Path
from peft_spp.merge import merge_checkpoint


def peak():
    # not ru_maxrss, in which Linux counts the process that started this one
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


merge_checkpoint(sys.argv[1], sys.argv[2], sys.argv[3] + "-small")
before = peak()
merge_checkpoint(sys.argv[4], sys.argv[5], sys.argv[3])
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory as Linux tells it")
def test_memory_does_not_grow_with_the_model(tmp_path):
    small = llama_case(tmp_path / "small")
    for folder in ("base", "adapter"):
        (tmp_path / folder).mkdir()
    weights = {f"{n}.fc.weight": torch.ones(8192, 4096, dtype=torch.bfloat16) for n in range(6)}
    save_file(weights, tmp_path / "base" / "model.safetensors")
    factors = {f"base_model.model.{n}.fc.spp_A.weight": torch.ones(16, 4096) for n in range(5)}
    factors |= {f"base_model.model.{n}.fc.spp_B.weight": torch.ones(8192, 1) for n in range(5)}
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    SPPConfig(target_modules=["fc"]).save_pretrained(tmp_path / "adapter")
    size = (tmp_path / "base" / "model.safetensors").stat().st_size
    arguments = [small.base, small.adapter, tmp_path / "out", tmp_path / "base", tmp_path / "adapter"]
    done = run_python(PEAK_MEMORY, *arguments)
    assert done.returncode == 0, done.stderr
    assert 2**20 < int(done.stdout) < 256 * 2**20 < size, done.stdout
