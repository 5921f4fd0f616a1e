# SPDX-License-Identifier: Apache-2.0
"""The output folder: either as it was, or with the whole model in it, whatever happens in between.

Everything is written into a hidden folder beside it, made durable, and renamed into place. A process that is killed
leaves that hidden folder behind, which may be deleted, and nothing else.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from torch import Tensor

from ..durable import OUT_OF_SPACE, sync_folder
from ..sparsity.safetensors_files import INDEX, SINGLE


class OutputFolder:
    """A folder that gets a new model as a whole or not at all. As a context manager it removes what was not published.

    Args:
        path (`Path`): The folder.
        overwrite (`bool`): Whether a model in it may be replaced.

    Raises:
        FileExistsError: If there is something at the path that must not be replaced.
    """

    def __init__(self, path: Path, overwrite: bool) -> None:
        # the target of a link is replaced, and the link stays
        self.path = path.expanduser().resolve()
        self._old_model = self._check_place(overwrite)
        self._working = self._hidden("writing")
        self._made_parents: list[Path] = []

    def _check_place(self, overwrite: bool) -> tuple[int, int] | None:
        """The identity of the model that will be replaced, if there is one."""
        if not self.path.exists():
            return None
        if not self.path.is_dir():
            raise FileExistsError(f"the output {self.path} is a file; name a folder")
        if not any(self.path.iterdir()):
            return None
        if not overwrite:
            raise FileExistsError(f"the output folder {self.path} is not empty; name another, or ask to overwrite it")
        if not any((self.path / name).is_file() for name in (SINGLE, INDEX, "config.json")):
            raise FileExistsError(f"the output folder {self.path} holds something else than a model; name another")
        return _identity(self.path)

    def check_apart_from(self, source: Path, what: str) -> None:
        """Check that replacing the folder leaves a folder that is read as it is.

        Args:
            source (`Path`): The folder that is read.
            what (`str`): What it is, for the message.

        Raises:
            ValueError: If one of the two is inside the other, or both are the same.
        """
        source = source.resolve()
        if source == self.path or source in self.path.parents or self.path in source.parents:
            raise ValueError(f"the output folder {self.path} and the {what} {source} must not contain each other")

    def check_space(self, size: int) -> None:
        """Check that the file system has room for the new model, beside the old one.

        Args:
            size (`int`): How many bytes will be written.

        Raises:
            OSError: If it has not.
        """
        place = next(parent for parent in self.path.parents if parent.is_dir())
        free = shutil.disk_usage(place).free
        if free < size:
            raise OSError(errno.ENOSPC, f"the model takes {size:,} bytes, and only {free:,} are free", str(place))

    def __enter__(self) -> OutputFolder:
        try:
            for parent in reversed([parent for parent in self.path.parents if not parent.exists()]):
                parent.mkdir(exist_ok=True)
                self._made_parents.append(parent)
            self._working.mkdir()
        except OSError:
            self._remove_made_parents()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        shutil.rmtree(self._working, ignore_errors=True)
        if error is not None:
            self._remove_made_parents()
        if isinstance(error, OSError) and error.errno in OUT_OF_SPACE:
            raise OSError(
                error.errno,
                f"no space for the model ({os.strerror(error.errno)}); nothing was changed",
                str(self.path),
            ) from error

    def _remove_made_parents(self) -> None:
        for parent in reversed(self._made_parents):
            with suppress(OSError):  # it is not empty any more: somebody else uses it
                parent.rmdir()

    def new_file(self, relative: Path) -> Path:
        """Where to write a file of the new model.

        Args:
            relative (`Path`): Its place in the model.

        Returns:
            `Path`: Its place until the model is published; its folder exists.
        """
        path = self._working / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def publish(self) -> None:
        """Put the new model in its place, in the place of the old one if there is one.

        Raises:
            FileExistsError: If somebody else has written to the place meanwhile; it is left as it is.
        """
        for where, _, _ in os.walk(self._working):
            sync_folder(Path(where))
        if self._old_model is None:
            self._rename_into_place()
        else:
            self._replace_old_model()
        sync_folder(self.path.parent)

    def _rename_into_place(self) -> None:
        try:
            # of what may be there, this replaces an empty folder and nothing else
            os.rename(self._working, self.path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise FileExistsError(
                f"somebody else has written to the output folder {self.path} meanwhile; it was left as it is"
            ) from error

    def _replace_old_model(self) -> None:
        aside = self._hidden("replaced")
        try:
            os.rename(self.path, aside)
            if _identity(aside) != self._old_model:
                raise FileExistsError(
                    f"somebody else has replaced the output folder {self.path} meanwhile; it was left as it is"
                )
            self._rename_into_place()
        except BaseException as error:
            if aside.exists():
                with suppress(OSError):  # yet another model has taken the place; this one stays beside it
                    os.rename(aside, self.path)
            if isinstance(error, FileNotFoundError):
                raise FileExistsError(f"somebody else is replacing the output folder {self.path}") from error
            raise
        shutil.rmtree(aside, ignore_errors=True)

    def _hidden(self, what: str) -> Path:
        return self.path.with_name(f".{self.path.name}.{what}-{secrets.token_hex(4)}")


def write_file(path: Path, pieces: Iterable[Tensor]) -> None:
    """Write a new file; [`~peft_spp.durable.sync_file`] makes it durable.

    Args:
        path (`Path`): The file.
        pieces (`Iterable[torch.Tensor]`): Its bytes, each uint8.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        for piece in pieces:
            rest = piece.numpy().data
            while rest:
                rest = rest[os.write(descriptor, rest) :]
    finally:
        os.close(descriptor)


def _identity(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino
