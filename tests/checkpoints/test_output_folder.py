# SPDX-License-Identifier: Apache-2.0
"""Where an output folder can be: mount points, parents that may not be written to, and impossible places."""

import errno
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from peft_spp.checkpoints import replacing
from peft_spp.checkpoints.output import OutputFolder
from peft_spp.checkpoints.own_files import MODEL

from helpers.output_folders import NEW, OLD, everything, replace, write


def test_a_folder_that_is_tried_stays_in_its_place(tmp_path):
    write(tmp_path / "out", OLD[MODEL])
    before = everything(tmp_path)
    assert replacing.can_be_renamed(tmp_path / "out")
    assert everything(tmp_path) == before


NOBODY = 65534


@contextmanager
def no_right_to_write_to(folder: str) -> Iterator[None]:
    """Root, who may write anywhere, is another user inside."""
    os.chmod(folder, 0o555)
    as_root = os.geteuid() == 0
    if as_root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if as_root:
            os.seteuid(0)
        os.chmod(folder, 0o755)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_folder_in_a_parent_that_may_not_be_written_to_is_filled_in_place(tmp_path):
    with tempfile.TemporaryDirectory() as public:
        folder = Path(public, "out")
        folder.mkdir()
        write(folder, OLD[MODEL])
        if os.geteuid() == 0:
            for path in (folder, *folder.rglob("*")):
                os.chown(path, NOBODY, NOBODY)
        with no_right_to_write_to(public):
            assert not replacing.can_be_renamed(folder)
            replace(folder, MODEL)
        assert everything(folder) == NEW


@pytest.mark.parametrize("old", [{}, OLD[MODEL]])
def test_the_current_folder_is_filled_in_place(old, tmp_path, monkeypatch):
    folder = tmp_path / "here"
    folder.mkdir()
    write(folder, old)
    monkeypatch.chdir(folder)
    replace(Path(), MODEL)
    assert everything(Path()) == NEW
    assert everything(tmp_path) == {f"here/{name}": content for name, content in NEW.items()}


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_place_that_may_not_be_written_to_is_told_by_the_check():
    with tempfile.TemporaryDirectory() as public, no_right_to_write_to(public):
        with pytest.raises(PermissionError, match=public):
            OutputFolder(Path(public, "a", "b"), False, MODEL).check(1)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("mode", [0o2770, 0o700, 0o1777])
def test_a_folder_keeps_its_mode_and_group_and_new_files_inherit_it(mode, full, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    if full:
        write(folder, OLD[MODEL])
    group = NOBODY if os.geteuid() == 0 else os.getgid()
    os.chown(folder, -1, group)
    folder.chmod(mode)
    replace(folder, MODEL)
    assert everything(folder) == NEW
    assert stat.S_IMODE(folder.stat().st_mode) == mode and folder.stat().st_gid == group
    inherited = {path.stat().st_gid for path in folder.rglob("*")}
    assert inherited == {group if mode & stat.S_ISGID else os.getgid()}


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_an_empty_folder_that_may_not_be_written_to_is_not_replaced():
    with tempfile.TemporaryDirectory() as public:
        os.chmod(public, 0o777)
        folder = Path(public, "out")
        folder.mkdir()
        with no_right_to_write_to(str(folder)), pytest.raises(PermissionError, match="out"):
            OutputFolder(folder, False, MODEL).check(1)
        assert folder.is_dir()


def test_a_name_that_is_too_long_is_told_by_the_check(tmp_path):
    with pytest.raises(OSError) as error:
        OutputFolder(tmp_path / ("x" * 300), False, MODEL).check(1)
    assert error.value.errno == errno.ENAMETOOLONG
    replace(tmp_path / ("x" * 255), MODEL)
    assert everything(tmp_path / ("x" * 255)) == NEW


def test_a_place_inside_of_a_file_is_told_by_the_check(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        OutputFolder(tmp_path / "file" / "out", True, MODEL).check(1)


def may_mount() -> bool:
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", tempfile.gettempdir()]
    return subprocess.run(command, capture_output=True).returncode == 0


MOUNTED = """
import subprocess, sys
from pathlib import Path
from peft_spp.checkpoints.replacing import can_be_renamed
from helpers.output_folders import MODEL, NEW, OLD, OutputFolder, everything, replace, write

root = Path(sys.argv[1])
for kind in ("tmpfs", "bind"):
    folder = root / kind
    folder.mkdir()
    if kind == "tmpfs":
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], check=True)
        (folder / "lost+found").mkdir()
    else:
        # on the file system of its parent, so that device numbers do not tell
        (root / "source").mkdir()
        subprocess.run(["mount", "--bind", root / "source", folder], check=True)
    lost = {"lost+found": "empty"} if kind == "tmpfs" else {}
    assert not can_be_renamed(folder)
    for start in ({}, OLD[MODEL]):
        for name in list(NEW):
            (folder / name).unlink(missing_ok=True)
        if (folder / "sub").exists():
            (folder / "sub").rmdir()
        write(folder, start)
        replace(folder, MODEL)
        assert everything(folder) == NEW | lost, everything(folder)
    if kind == "tmpfs":
        # the space of the mounted file system counts, not that of its parent
        try:
            OutputFolder(folder, True, MODEL)
            out = OutputFolder(folder / "new", False, MODEL)
            out.check(1 << 20)
            OutputFolder(folder, False, MODEL)
            raise AssertionError
        except FileExistsError as error:
            assert "not empty" in str(error)
        try:
            OutputFolder(folder / "new", False, MODEL).check(5 << 20)
            raise AssertionError
        except OSError as error:
            assert error.errno == 28, error
    # a file that is mounted on its own cannot be moved
    (root / "one").write_text("mine")
    (folder / "tokenizer.json").write_text("old")
    (folder / "config.json").write_text(OLD[MODEL]["config.json"])
    (folder / "sub" / "more.json").unlink()
    (folder / "sub").rmdir()
    subprocess.run(["mount", "--bind", root / "one", folder / "tokenizer.json"], check=True)
    try:
        replace(folder, MODEL)
        raise AssertionError
    except FileExistsError as error:
        assert "tokenizer.json" in str(error)
print("done")
"""


@pytest.mark.skipif(not may_mount(), reason="needs the right to mount")
def test_a_mount_point_is_filled_without_renaming_it(tmp_path):
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        ["unshare", "-m", sys.executable, "-c", MOUNTED, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "done"
