# SPDX-License-Identifier: Apache-2.0
"""Models and adapters as they are named on the command line."""

from __future__ import annotations

from pathlib import Path

from ..checkpoints.checkpoint import OTHER_WEIGHTS
from ..checkpoints.hub import local_folder


def local_source(source: str) -> Path:
    """Find a file or folder, or download a repository from the Hub."""
    path = Path(source).expanduser()
    return path if path.is_file() else local_folder(source, ignore=OTHER_WEIGHTS)
