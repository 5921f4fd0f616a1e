# SPDX-License-Identifier: Apache-2.0
"""Putting a written folder in its place: by renaming it, or file by file where the place cannot be renamed.

Nothing is deleted here but the entries that the caller lists, and those only if they are still the same.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from .own_files import Signature, scan
from .safetensors_files import INDEX, SINGLE


Entries = Mapping[Path, Signature]

# without these, a folder is not loaded: they leave first and arrive last
_LAST = ("adapter_config.json", SINGLE, INDEX, "config.json")


def mount_points() -> frozenset[str]:
    """Where file systems are mounted, as far as the system tells; neither a file nor a folder there can be moved."""
    try:
        table = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return frozenset()
    fields = (line.split(" ") for line in table.splitlines())
    return frozenset(re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), one[4]) for one in fields if len(one) > 4)


def can_be_renamed(folder: Path) -> bool:
    """
    Try whether a folder can be renamed, without renaming it.

    A mount point cannot, nor a folder whose parent may not be written to, nor one of a lower layer of an overlay. The
    current folder is not to be: a shell in it would stay in the old one, which is removed.
    """
    if str(folder) in mount_points() or folder.samefile(os.curdir):
        return False
    try:
        trial = Path(tempfile.mkdtemp(prefix=".peft-spp.", dir=folder.parent))
    except OSError:
        return False
    taken = trial / "taken"
    try:
        taken.touch()
        # nothing can be renamed onto a folder that is not empty, and that is the last thing to be checked
        os.rename(folder, trial)
    except OSError as error:
        return error.errno in (errno.ENOTEMPTY, errno.EEXIST)
    else:
        os.rename(trial, folder)  # an unusual file system, which has replaced the folder of the trial
        return True
    finally:
        taken.unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            trial.rmdir()


def rename_into_place(working: Path, path: Path) -> None:
    """Rename a folder to a path where there is nothing, or an empty folder."""
    try:
        os.rename(working, path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise _changed(path) from error


def exchange(working: Path, path: Path, old: Entries, aside: Path) -> list[Path]:
    """Rename an old folder aside and a new one into its place, and remove the old one."""
    try:
        os.rename(path, aside)
        if scan(aside) != old:
            raise _changed(path)
        rename_into_place(working, path)
    except BaseException as error:
        if aside.exists():
            try:
                os.rename(aside, path)
            except OSError as problem:  # such as yet another folder in its place
                if isinstance(error, Exception):
                    reason = problem.strerror or problem
                    raise FileExistsError(
                        f"the output folder {path} could not be put back ({reason}): its files are in {aside}"
                    ) from error
                raise error from problem
        if isinstance(error, FileNotFoundError):
            raise FileExistsError(f"another process is replacing the output folder {path}") from error
        raise
    return remove(aside, old)


def put_inside(working: Path, path: Path, old: Entries, aside: Path) -> list[Path]:
    """
    Move the files of a new folder into an old one that cannot be renamed, and remove the files of the old one.

    A process that is killed meanwhile leaves the old files in one hidden folder and the rest of the new ones in
    another; what is in the place does not load until it is complete.
    """
    ours = working.relative_to(path)
    if {name: one for name, one in scan(path).items() if ours not in (name, *name.parents)} != old:
        raise _changed(path)
    moved: list[tuple[Path, Path]] = []
    try:
        for name in sorted(old, key=_arrival, reverse=True):
            _move(path / name, aside / name, moved)
        _remove_empty_folders(path, old)
        for name in sorted(scan(working), key=_arrival):
            _move(working / name, path / name, moved)
    except BaseException:
        for source, target in reversed(moved):
            source.parent.mkdir(parents=True, exist_ok=True)
            os.rename(target, source)
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return remove(aside, old) + _remove_empty_folders(path, old)


def _move(source: Path, target: Path, moved: list[tuple[Path, Path]]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(target):
        raise _changed(target)
    os.rename(source, target)
    moved.append((source, target))


def _arrival(name: Path) -> tuple[int, str]:
    shown = name.as_posix()
    return (1 + _LAST.index(shown) if shown in _LAST else 0), shown


def _folders(entries: Entries) -> list[Path]:
    """The folders that entries lie in, the deepest first."""
    found = {parent for name in entries for parent in name.parents if parent != Path()}
    return sorted(found, key=lambda folder: len(folder.parts), reverse=True)


def _remove_empty_folders(path: Path, entries: Entries) -> list[Path]:
    """Remove the folders that entries have left empty; those that cannot be removed are returned."""
    folders = [path / one for one in _folders(entries)]
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()
    return [one for one in folders if one.is_dir() and not any(one.iterdir())]


def remove(folder: Path, entries: Entries) -> list[Path]:
    """Remove entries of a folder that are still the same, and the folders that are empty after that."""
    present = scan(folder) if folder.exists() else {}
    for name, signature in entries.items():
        if present.get(name) == signature:
            with suppress(OSError):
                (folder / name).unlink()
    for one in (*_folders(entries), Path()):
        with suppress(OSError):
            (folder / one).rmdir()
    return [folder / name for name in scan(folder)] if folder.exists() else []


def _changed(path: Path) -> FileExistsError:
    return FileExistsError(f"another process has written to the output folder {path} meanwhile; it was left unchanged")
