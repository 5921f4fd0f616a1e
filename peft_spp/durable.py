# SPDX-License-Identifier: Apache-2.0
"""Files that are either complete or unchanged: written aside, brought to the disk, and renamed into place."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The errors of a disk, a quota or a file that is full."""


@contextmanager
def working_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A new hidden folder in which files are written before they are published in the folder around it."""
    folder = Path(folder)
    new = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        working = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
        try:
            yield working
        finally:
            shutil.rmtree(working, ignore_errors=True)
            for one in new:
                with suppress(OSError):  # it is not empty
                    one.rmdir()
    except OSError as error:
        if error.errno not in OUT_OF_SPACE:
            raise
        raise no_space(error.errno, folder) from error


def no_space(code: int | None, folder: Path) -> OSError:
    """The error to raise when nothing was changed because the disk is full."""
    reason = os.strerror(code) if code is not None else "the disk is full"
    return OSError(code, f"no space left to write to it ({reason}); the files in it are unchanged", str(folder))


def publish(written: Path, path: Path) -> None:
    """Put a written file in its place, and return when it is on the disk."""
    sync_file(written)
    os.replace(written, path)
    sync_folder(path.parent)


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let a function write a file that is either complete or unchanged."""
    with working_folder(path.parent) as working:
        write(working / path.name)
        publish(working / path.name, path)


def write_text(path: Path, text: str) -> None:
    """Write a text file that is either complete or unchanged."""
    write_file(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def sync_file(path: Path) -> None:
    """Wait until a written file is on the disk."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk: without that, a power failure may undo a rename."""
    if os.name != "posix":
        return  # elsewhere folders cannot be opened, and renames are durable by themselves
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
