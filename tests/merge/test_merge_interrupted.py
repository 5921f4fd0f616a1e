# SPDX-License-Identifier: Apache-2.0
"""A merge that ends early, or with another at once: the output is the whole model or what was there before."""

import errno
import os
import shutil
import sys
import threading
from collections import namedtuple
from pathlib import Path

import pytest

from peft_spp.checkpoints import output
from peft_spp.merge import merge_checkpoint

from helpers.merge_cases import (
    assert_same_bits,
    contents,
    hidden,
    llama_case,
    merged_by_peft,
    names,
    run_python,
    stored,
)


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
    done = run_python(code, "merge", case.adapter, tmp_path / "out")
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
    done = run_python(KILLED_AT_EVERY_CALL, case.base, case.adapter, tmp_path / "place" / "out", overwrite)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 40, done.stdout


def test_folders_are_made_durable_too(tmp_path, case, monkeypatch):
    """A rename that is not followed by a sync of the folder may be undone by a power failure."""
    events = []
    sync, rename = output.sync_folder, os.rename
    monkeypatch.setattr(output, "sync_folder", lambda folder: (events.append(("sync", folder)), sync(folder)))
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append(("rename", Path(b))), rename(a, b)))
    merge_checkpoint(case.base, case.adapter, tmp_path / "out")
    kinds = [kind for kind, _ in events]
    assert kinds == ["sync", "rename", "sync"] and events[1:] == [("rename", tmp_path / "out"), ("sync", tmp_path)]
