# SPDX-License-Identifier: Apache-2.0
"""Models and adapters by the name of a local folder or of a repository on the Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.utils import HFValidationError, validate_repo_id


def local_folder(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    allow: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
) -> Path:
    """Find a folder, or download it from the Hub."""
    if not os.fspath(source):
        raise FileNotFoundError("the name of a model or adapter is empty")
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(f"{path} is not a folder")
    # the Hub would be asked again and again for what cannot be in it
    if looks_like_path(source):
        raise FileNotFoundError(f"there is no folder {os.fspath(source)!r} (looked for {str(path.absolute())!r})")
    try:
        return Path(
            snapshot_download(
                os.fspath(source),
                revision=revision,
                allow_patterns=None if allow is None else list(allow),
                ignore_patterns=None if ignore is None else list(ignore),
            )
        )
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{os.fspath(source)!r} is not a local folder, and could not be downloaded from the Hub: {error}"
        ) from error


def hub_id(source: str | os.PathLike[str]) -> str | None:
    """The id of a repository on the Hub; `None` for a local folder, whose place nobody else needs to know."""
    return None if Path(source).expanduser().is_dir() else os.fspath(source)


def looks_like_path(name: str | os.PathLike[str]) -> bool:
    """Whether a name is meant as a path, and not as the id of a repository on the Hub."""
    if not isinstance(name, str) or re.match(r"[./~\\]|[A-Za-z]:", name) or name.endswith("/"):
        return True
    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    return False
