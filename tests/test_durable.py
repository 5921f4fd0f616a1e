# SPDX-License-Identifier: Apache-2.0
"""What is written next to models and adapters: complete or as it was."""

import errno
import os

import pytest

from peft_spp.durable import write_file, write_text


def write_report(path):
    write_text(path, "new")


def write_result(path):
    from benchmarks.harness import BenchmarkResult

    BenchmarkResult("name", "reference", {}, {}).save(path)


def write_picture(path):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from benchmarks.harness.plots import save_figure

    save_figure(Figure(), path.with_suffix(".png"))


WRITERS = [write_report, write_result, write_picture]


@pytest.mark.parametrize("write", WRITERS)
def test_a_file_is_written_whole_and_nothing_beside_it(tmp_path, write):
    write(tmp_path / "new" / "file.txt")
    (written,) = (tmp_path / "new").iterdir()
    assert written.stat().st_size > 0


@pytest.mark.parametrize("write", WRITERS)
def test_a_disk_that_is_full_leaves_the_file_as_it_was(tmp_path, write, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "no space")

    for name in ("file.txt", "file.png"):
        (tmp_path / name).write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=str(tmp_path)) as raised:
        write(tmp_path / "file.txt")
    assert raised.value.errno == errno.ENOSPC
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file.txt": "old", "file.png": "old"}


def test_an_error_while_writing_leaves_the_file_as_it_was(tmp_path):
    def write(path):
        path.write_text("half")
        raise KeyError("the rest")

    (tmp_path / "file.txt").write_text("old")
    with pytest.raises(KeyError):
        write_file(tmp_path / "file.txt", write)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
