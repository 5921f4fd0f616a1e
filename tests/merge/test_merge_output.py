# SPDX-License-Identifier: Apache-2.0
"""What is in the output folder: the whole model or what was there before, whatever happens."""

import errno
import os
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from peft_spp import SPPConfig
from peft_spp.checkpoints import hub, output
from peft_spp.merge import merge_checkpoint

from helpers.merge_cases import assert_same_bits, contents, edit_json, llama_case, merged_by_peft, stored


OLD_CONFIG = '{"model_type": "llama"}'
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def case(tmp_path):
    return llama_case(tmp_path, shard_size="20KB")


@pytest.fixture
def old_model(tmp_path):
    """A model in the place of the output, with a file that the new one does not have."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "config.json").write_text(OLD_CONFIG)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "old.safetensors"}}')
    (folder / "old.safetensors").write_bytes(b"old")
    return folder


def names(folder: Path) -> set[str]:
    """The files of a model besides its card, which merging writes where there is none."""
    return contents(folder).keys() - {"README.md"}


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


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


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interruption_leaves_nothing(tmp_path, case, request, error, overwrite):
    out = request.getfixturevalue("old_model") if overwrite else tmp_path / "new" / "out"
    before = contents(tmp_path)

    def interrupt(done, total):
        if done > total / 2:
            raise error

    with pytest.raises(error):
        merge_checkpoint(case.base, case.adapter, out, overwrite=overwrite, progress=interrupt)
    assert contents(tmp_path) == before and not (tmp_path / "new").exists() and hidden(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("function", ["write", "fsync"])
def test_a_full_disk_leaves_the_old_model(tmp_path, case, old_model, monkeypatch, code, function):
    calls, works = [], getattr(os, function)

    def full(*args):
        calls.append(args)
        if len(calls) > 2:
            raise OSError(code, os.strerror(code))
        return works(*args)

    before = contents(tmp_path)
    monkeypatch.setattr(os, function, full)
    with pytest.raises(OSError, match="space") as error:
        merge_checkpoint(case.base, case.adapter, old_model, overwrite=True)
    monkeypatch.undo()
    assert error.value.errno == code and str(old_model) in str(error.value)
    assert contents(tmp_path) == before and hidden(tmp_path) == []


def test_writes_that_take_less_than_asked_are_continued(tmp_path, case, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[: len(data) // 2 + 1]))
    merge_checkpoint(case.base, case.adapter, tmp_path / "out")
    monkeypatch.undo()
    assert_same_bits(stored(tmp_path / "out"), stored(merged_by_peft(case, tmp_path / "peft")))


def test_too_little_space_is_told_before_anything_is_written(tmp_path, case, monkeypatch):
    usage = namedtuple("usage", "total used free")
    size = sum(len(content) for content in contents(case.base).values())
    before = contents(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(size, 1, size - 1))
    with pytest.raises(OSError, match=f"{size:,}") as error:
        merge_checkpoint(case.base, case.adapter, tmp_path / "out")
    assert error.value.errno == errno.ENOSPC and contents(tmp_path) == before


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
def test_a_file_size_limit_leaves_nothing(tmp_path, case):
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "from peft_spp.cli import app; app()"
    )
    before = contents(tmp_path)
    command = [sys.executable, "-c", code, "merge", str(case.adapter), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    # other packages may log lines of their own when they are imported
    assert done.returncode == 2 and "space" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert contents(tmp_path) == before and not (tmp_path / "out").exists() and hidden(tmp_path) == []


def test_a_file_that_does_not_read_back_leaves_nothing(tmp_path, case, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(len(data))))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"model-.*safetensors"):
        merge_checkpoint(case.base, case.adapter, tmp_path / "out")
    monkeypatch.undo()
    assert contents(tmp_path) == before and hidden(tmp_path) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_merge_into_the_same_folder_wins_or_fails(tmp_path, case, request, overwrite):
    """The second starts and ends while the first is at work: the first finds its place taken."""
    out = request.getfixturevalue("old_model") if overwrite else tmp_path / "out"
    other = llama_case(tmp_path / "other", shard_size="40KB")
    started = []

    def start_another(done, total):
        if not started:
            started.append(merge_checkpoint(other.base, other.adapter, out, overwrite=overwrite))

    with pytest.raises(FileExistsError, match="out"):
        merge_checkpoint(case.base, case.adapter, out, overwrite=overwrite, progress=start_another)
    assert names(out) == names(other.base)
    assert_same_bits(stored(out), stored(merged_by_peft(other, tmp_path / "peft")))
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_merges_that_end_together_one_wins(tmp_path, case, request, overwrite):
    out = request.getfixturevalue("old_model") if overwrite else tmp_path / "out"
    expected = stored(merged_by_peft(case, tmp_path / "peft"))
    barrier, errors = threading.Barrier(4), []

    def merge():
        waited = []

        def wait_at_the_end(done, total):
            if done == total and not waited:
                waited.append(barrier.wait(timeout=60))

        try:
            merge_checkpoint(case.base, case.adapter, out, overwrite=overwrite, progress=wait_at_the_end)
        except FileExistsError as error:
            errors.append(error)

    threads = [threading.Thread(target=merge) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 3
    assert_same_bits(stored(out), expected)
    assert hidden(tmp_path) == []


KILLED_AT_EVERY_CALL = """
import os, shutil, signal, sys
from pathlib import Path
import torch
from peft_spp.merge import merge_checkpoint

base, adapter, out, overwrite = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4] == "True"
OLD = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"old"}
torch.set_num_threads(2)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def merge(kill_at):
    calls = 0

    def killing(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("open", "write", "fsync", "rename", "close", "mkdir", "rmdir", "unlink"):
        setattr(os, name, killing(getattr(os, name)))
    merge_checkpoint(base, adapter, out, overwrite=overwrite)


def place_old_model():
    shutil.rmtree(out, ignore_errors=True)
    if overwrite:
        out.mkdir()
        for name, data in OLD.items():
            (out / name).write_bytes(data)


def child(kill_at):
    pid = os.fork()
    if not pid:
        try:
            merge(kill_at)
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


place_old_model()
assert child(0) == 0
new = contents(out)
outcomes = {"absent": 0, "old": 0, "new": 0}
for kill_at in range(1, 10_000):
    place_old_model()
    status = child(kill_at)
    found = contents(out) if out.exists() else None
    outcome = "absent" if found is None else "new" if found == new else "old"
    assert outcome != "old" or (overwrite and found == OLD), (kill_at, found.keys())
    # the old model may be out of its place for a moment, but not lost
    others = [contents(p) for p in out.parent.iterdir() if p.name.startswith(f".{out.name}.")]
    assert not overwrite or outcome != "absent" or OLD in others, kill_at
    outcomes[outcome] += 1
    for path in out.parent.glob(f".{out.name}.*"):
        shutil.rmtree(path)
    if status == 0:
        break
    assert os.WIFSIGNALED(status), (kill_at, status)
print(kill_at, outcomes)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_process_killed_at_any_point_leaves_a_whole_model_or_none(tmp_path, overwrite):
    case = llama_case(tmp_path, shard_size="20KB", settings={"num_hidden_layers": 1})
    (tmp_path / "place").mkdir()
    command = [sys.executable, "-c", KILLED_AT_EVERY_CALL, str(case.base), str(case.adapter)]
    command += [str(tmp_path / "place" / "out"), str(overwrite)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 40, done.stdout


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
    done = subprocess.run(
        [sys.executable, "-c", PEAK_MEMORY, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=True,
    )
    assert 2**20 < int(done.stdout) < 256 * 2**20 < size, done.stdout


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


def test_folders_are_made_durable_too(tmp_path, case, monkeypatch):
    """A rename that is not followed by a sync of the folder may be undone by a power failure."""
    events = []
    sync, rename = output.sync_folder, os.rename
    monkeypatch.setattr(output, "sync_folder", lambda folder: (events.append(("sync", folder)), sync(folder)))
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append(("rename", Path(b))), rename(a, b)))
    merge_checkpoint(case.base, case.adapter, tmp_path / "out")
    kinds = [kind for kind, _ in events]
    assert kinds == ["sync", "rename", "sync"] and events[1:] == [("rename", tmp_path / "out"), ("sync", tmp_path)]
