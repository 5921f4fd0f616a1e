# SPDX-License-Identifier: Apache-2.0
"""The output folder: unchanged, or with the whole model or adapter in it, whatever happens in between.

Everything is written into a hidden folder, made durable, and moved into place. A process that is killed leaves that
hidden folder behind, which may be deleted, and nothing else.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from torch import Tensor

from ..durable import OUT_OF_SPACE, sync_folder
from ..reports import some
from .own_files import FolderKind, Signature, scan
from .replacing import can_be_renamed, exchange, mount_points, put_inside, rename_into_place


_SHOWN = 5
# of a name, so that a hidden one made from it is not too long for the file system
_NAME_LENGTH = 40


def check_utf8(folder: Path) -> None:
    """Check that `safetensors` and `tokenizers` can write to a folder: they take paths in UTF-8 only."""
    if str(folder) != os.fsencode(folder).decode("utf-8", "replace"):
        raise ValueError(f"the path of the output folder {folder} is not UTF-8: name another folder")


class OutputFolder:
    """A folder that gets a new model or adapter as a whole or not at all.

    Only the files of an old one are replaced. As a context manager it removes what was not published.

    Args:
        path (`Path`): The folder.
        overwrite (`bool`): Whether a model or adapter in it may be replaced.
        kind (`FolderKind`): Which of the two.

    Raises:
        FileExistsError: If there is something at the path that must not be replaced.
        ValueError: If the path is not UTF-8, which `safetensors` could not read it back from.
    """

    def __init__(self, path: Path, overwrite: bool, kind: FolderKind) -> None:
        # the target of a link is replaced, and the link stays
        self.path = Path(os.path.realpath(path.expanduser()))
        check_utf8(self.path)
        self._kind = kind
        self._old: dict[Path, Signature] = {}
        self._exists = self.path.exists()
        self._in_place = False
        self._mode: int | None = None
        self._made_parents: list[Path] = []
        self._working = self.path
        if not self._exists:
            return
        if not self.path.is_dir():
            raise FileExistsError(f"the output {self.path} is a file; name a folder")
        self._old = scan(self.path)
        if self._old and not overwrite:
            raise FileExistsError(f"the output folder {self.path} is not empty; name another, or ask to overwrite it")

    @property
    def replaced(self) -> tuple[str, ...]:
        """The files in the folder that will be replaced."""
        return tuple(sorted(name.as_posix() for name in self._old))

    def check_apart_from(self, source: Path, what: str) -> None:
        """Check that replacing the folder leaves a folder alone that is read."""
        source = source.resolve()
        if source == self.path or source in self.path.parents or self.path in source.parents:
            raise ValueError(f"the output folder {self.path} and the {what} {source} must not contain each other")

    def check(self, size: int, copied: Mapping[Path, Path] | None = None) -> None:
        """Check all that publishing will need: call it before any work, in a dry run as well."""
        mounts = mount_points()
        foreign = self._kind.foreign(self.path, self._old, copied)
        foreign += [name.as_posix() for name in self._old if str(self.path / name) in mounts]
        if foreign:
            raise FileExistsError(
                f"the output folder {self.path} holds files that are not known to be part of {self._kind.what}, and "
                f"would be lost: {some(foreign, _SHOWN)}. Move them elsewhere, or name another folder"
            )
        for source in (copied or {}).values():
            with source.open("rb"):
                pass
        self._in_place = self._exists and not can_be_renamed(self.path)
        place = self._try_to_write()
        free = shutil.disk_usage(place).free
        if free < size:
            raise OSError(errno.ENOSPC, f"the output takes {size:,} bytes, and only {free:,} are free", str(place))

    def _try_to_write(self) -> Path:
        """Make and remove a file where the new ones will be written, and find the file system that they go to."""
        place = self.path if self._in_place else next(one for one in self.path.parents if one.exists())
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "the output folder would be inside a file", str(place))
        if not self._exists:
            with suppress(FileNotFoundError):
                self.path.lstat()  # a name that is too long for the file system
        own = [self.path] if self._exists else []
        for folder in {place, *own, *(self.path / name.parent for name in self._old)}:
            try:
                tempfile.TemporaryFile(prefix=".peft-spp.", dir=folder).close()
            except OSError as error:
                full = error.errno in OUT_OF_SPACE
                what = "there is no space for the output" if full else "the output cannot be written"
                raise OSError(error.errno, f"{what} ({error.strerror})", str(folder)) from error
        return place

    def __enter__(self) -> OutputFolder:
        self._working = self._hidden("writing")
        try:
            for parent in reversed([parent for parent in self.path.parents if not parent.exists()]):
                parent.mkdir(exist_ok=True)
                self._made_parents.append(parent)
            self._working.mkdir()
            self._take_over_owner_and_mode()
        except OSError:
            self._remove_made_parents()
            raise
        return self

    def _take_over_owner_and_mode(self) -> None:
        """Give the new folder what the old one has, so that new files inherit its group if it says so."""
        if self._in_place or not self._exists:
            return
        old = self.path.stat()
        for owner in (old.st_uid, -1):
            # users may hand a folder over to one of their groups alone, and some file systems have no owners
            with suppress(OSError):
                os.chown(self._working, owner, old.st_gid)
                break
        self._mode = stat.S_IMODE(old.st_mode)
        with suppress(OSError):
            self._working.chmod(self._mode | stat.S_IRWXU)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        shutil.rmtree(self._working, ignore_errors=True)
        if error is not None:
            self._remove_made_parents()
        elif self._working.exists():
            warnings.warn(
                f"{self._working}, which the new files were written in, could not be removed. It can be deleted.",
                stacklevel=3,
            )
        if isinstance(error, OSError) and error.errno in OUT_OF_SPACE:
            raise OSError(
                error.errno,
                f"no space for the output ({os.strerror(error.errno)}); nothing was changed",
                str(self.path),
            ) from error

    def _remove_made_parents(self) -> None:
        for parent in reversed(self._made_parents):
            with suppress(OSError):  # it is not empty any more: somebody else uses it
                parent.rmdir()

    def new_file(self, relative: Path) -> Path:
        """Where to write a file of the new folder."""
        path = self._working / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def publish(self) -> None:
        """Put the new files in their place, in the place of the old ones if there are any."""
        for where, _, _ in os.walk(self._working):
            sync_folder(Path(where))
        if self._mode is not None:
            with suppress(OSError):
                self._working.chmod(self._mode)
        left: list[Path] = []
        if self._in_place:
            left = put_inside(self._working, self.path, self._old, self._hidden("replaced"))
            sync_folder(self.path)
        elif self._old:
            left = exchange(self._working, self.path, self._old, self._hidden("replaced"))
        else:
            rename_into_place(self._working, self.path)
        sync_folder(self.path.parent)
        if left:
            warnings.warn(
                f"The new files are in {self.path}, but these old ones could not be removed: "
                f"{some([str(one) for one in left], _SHOWN)}.",
                stacklevel=3,
            )

    def _hidden(self, what: str) -> Path:
        name = f".{self.path.name[:_NAME_LENGTH]}.{what}-{secrets.token_hex(4)}"
        return self.path / name if self._in_place else self.path.with_name(name)


def write_file(path: Path, pieces: Iterable[Tensor]) -> None:
    """Write a new file; [`~peft_spp.durable.sync_file`] makes it durable."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        for piece in pieces:
            rest = piece.numpy().data
            while rest:
                rest = rest[os.write(descriptor, rest) :]
    finally:
        os.close(descriptor)


def overwritten_line(files: tuple[str, ...], dry_run: bool) -> list[str]:
    """What a report says of the files that gave way to new ones: a line, or nothing."""
    what = "would be replaced" if dry_run else "were replaced"
    return [f"{len(files)} files in the output folder {what}: {some(files, _SHOWN)}"] if files else []
