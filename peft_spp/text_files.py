# SPDX-License-Identifier: Apache-2.0
"""Local files of texts, read with `datasets`, and what is wrong with one that it refuses."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, cast

from .error_text import one_line
from .installing import how_to_install


TEXT_FIELD = "text"
"""The column that holds the texts."""

_NO_TEXT = f"has no {TEXT_FIELD!r} that is a string"

BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".txt": "text",
}
"""What `datasets.load_dataset` calls each kind of file, by the end of its name in lower case."""

_OPENERS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_COMPRESSED = (*_OPENERS, ".zst")
READ_ERRORS = (OSError, ValueError, EOFError, zlib.error, lzma.LZMAError)
"""What reading a damaged file raises, in addition to the errors of `datasets`."""


def builder_of(file: Path) -> str | None:
    """What `datasets.load_dataset` calls the kind of a file."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    while suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return BUILDERS.get(suffixes[-1]) if suffixes else None


def builder_options(builder: str) -> dict[str, Any]:
    """Options of `datasets.load_dataset` for a kind of local file."""
    # some editors begin a text file with a byte order mark
    return {"encoding": "utf-8-sig"} if builder == "text" else {}


def kinds() -> str:
    """The ends of names of all kinds, for messages."""
    *others, last = BUILDERS
    return f"{', '.join(others)} or {last}"


def read_texts(file: Path) -> list[str]:
    if not file.is_file():
        raise FileNotFoundError(f"the file {str(file)!r} does not exist")
    builder = builder_of(file)
    if builder in (None, "text"):
        try:
            with _open(file) as stream:
                return [stream.read().decode("utf-8-sig")]
        except READ_ERRORS as error:
            raise ValueError(f"the file {file} is not text in UTF-8: {one_line(error)}") from error
    if not file.stat().st_size:
        raise ValueError(f"the file {file} is empty")
    for row, text in enumerate(texts := _load_texts(file, cast(str, builder))):
        if not isinstance(text, str):
            raise ValueError(f"{_place(file, builder == 'json', row)} of the file {file} {_NO_TEXT}")
    return texts


def _load_texts(file: Path, builder: str) -> list[Any]:
    try:
        import datasets  # type: ignore[import-untyped]
        from datasets.exceptions import DatasetsError  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise ImportError(
            f"reading {file} needs datasets, which is not installed. Install it with: {how_to_install('train')}. "
            "Plain text files do not need it.",
            name="datasets",
        ) from error
    with TemporaryDirectory() as cache, _quiet_datasets():
        try:
            refuse_null(file)
            rows = datasets.load_dataset(
                builder, data_files=str(file), split="train", cache_dir=cache, keep_in_memory=True
            )
            if TEXT_FIELD in rows.column_names:
                return list(rows[TEXT_FIELD])
        except (*READ_ERRORS, DatasetsError) as error:
            fault = find_fault(file, TEXT_FIELD) or f"the file {file} cannot be read as {builder}: {one_line(error)}"
            raise ValueError(fault) from error
    raise ValueError(
        f"the file {file} has no column {TEXT_FIELD!r}; its columns are {', '.join(map(repr, rows.column_names))}"
    )


def refuse_null(file: Path) -> None:
    """Refuse JSON lines with a row that is null: where a block of the file has no other rows, Arrow crashes."""
    if builder_of(file) != "json":
        return
    with _open(file) as stream:
        for _, line in _lines(stream):
            if b"null" in line and not line.replace(b"null", b"").removeprefix(b"\xef\xbb\xbf").strip():
                raise ValueError("a row is null")


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    import datasets

    bars, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()


def find_fault(file: Path, field: str | None = None) -> str | None:
    """What is wrong with a file of JSON that `datasets` refuses, as its errors name neither the file nor the line."""
    if builder_of(file) != "json":
        return None
    try:
        with _open(file) as stream:
            first = stream.readline().removeprefix(b"\xef\xbb\xbf")
            stream.seek(0)
            is_lines = not first.lstrip().startswith(b"[") and first.strip() not in (b"", b"{")
            numbered = _lines(stream) if is_lines else [(None, stream.read())]
            for number, line in numbered:
                if fault := _fault(line, field if is_lines else None):
                    return f"line {number} of the file {file} {fault}" if number else f"the file {file} {fault}"
    except READ_ERRORS as error:
        # those of the system have a number, and those of a damaged archive have none
        what = "is damaged" if getattr(error, "errno", None) is None else "cannot be read"
        return f"the file {file} {what}: {one_line(error)}"
    return None


def _fault(data: bytes, field: str | None) -> str | None:
    try:
        content = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_without_duplicates)
    except UnicodeDecodeError as error:
        return f"is not text in UTF-8: {error}"
    except (ValueError, RecursionError) as error:
        return f"is not valid JSON: {error}"
    if not isinstance(content, (dict, list)):
        return f'is not a JSON object such as {{"{TEXT_FIELD}": "..."}}'
    if field is not None and not (isinstance(content, dict) and isinstance(content.get(field), str)):
        return _NO_TEXT
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "contains an unpaired surrogate (\\ud800 to \\udfff), which is not a character. Remove it"
    return None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"duplicate key {next(name for name in names if names.count(name) > 1)!r}")
    return content


def _open(file: Path) -> BinaryIO:
    return cast(BinaryIO, _OPENERS.get(file.suffix.lower(), open)(file, "rb"))


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers. Only a newline ends one, unlike with `str.splitlines`."""
    return ((number, line) for number, line in enumerate(stream, 1) if line.strip())


def _place(file: Path, is_json: bool, row: int) -> str:
    """Where a row is in a file: the line, if each row is one."""
    if is_json and file.suffix.lower() != ".zst":
        with _open(file) as stream:
            numbers = [number for number, _ in _lines(stream)]
            stream.seek(0)
            if not stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[") and row < len(numbers):
                return f"line {numbers[row]}"
    return f"row {row + 1}"
