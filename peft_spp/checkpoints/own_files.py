# SPDX-License-Identifier: Apache-2.0
"""Which files of an output folder are a model's or an adapter's, so that a new one may take their place."""

from __future__ import annotations

import filecmp
import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..sparsity.base_masks import BASE_MASKS
from ..sparsity.safetensors_files import INDEX, SINGLE
from .merged import MERGED


Signature = tuple[int, int, int, int, int]
"""What tells whether an entry of a folder is still the one that was there: device, inode, mode, size and time."""

CARD = "README.md"
CONFIG = "config.json"
# the root of a file system may have it, and nobody but the file system writes there
_OF_FILE_SYSTEM = "lost+found"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_CHAT_TEMPLATE = re.compile(r"additional_chat_templates/[^/]+\.jinja")
_MODEL_FILES = frozenset(
    {
        CONFIG,
        "generation_config.json",
        SINGLE,
        INDEX,
        CARD,
        # tokenizers
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "spiece.model",
        "sentencepiece.bpe.model",
        "chat_template.jinja",
        "chat_template.json",
        # processors
        "processor_config.json",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
    }
)


def scan(folder: Path) -> dict[Path, Signature]:
    """List all that a folder holds: files, links (not what they lead to) and empty folders.

    Args:
        folder (`Path`): The folder.

    Returns:
        `dict[Path, Signature]`: The signature of each entry, by its path relative to the folder.

    Raises:
        OSError: If a part of it cannot be listed.
    """
    found = {}
    for where, folders, names in os.walk(folder, onerror=_raise):
        here = Path(where)
        if here == folder and _OF_FILE_SYSTEM in folders and os.path.ismount(folder):
            folders.remove(_OF_FILE_SYSTEM)
        links = [name for name in folders if (here / name).is_symlink()]
        empty = [] if folders or names or here == folder else [here]
        for path in (*(here / name for name in (*names, *links)), *empty):
            status = path.lstat()
            found[path.relative_to(folder)] = (
                status.st_dev,
                status.st_ino,
                status.st_mode,
                status.st_size,
                status.st_mtime_ns,
            )
    return found


def _raise(error: OSError) -> None:
    raise error


@dataclass(frozen=True)
class FolderKind:
    """What a folder is written as, which tells the files in it that are replaced from those that are not.

    Args:
        what (`str`): What to call it.
        sign (`Callable[[Path], bool]`): Whether a folder holds one.
        is_named (`Callable[[Path, str], bool]`): Whether the file of a folder under a relative name is a part of it.
    """

    what: str
    sign: Callable[[Path], bool]
    is_named: Callable[[Path, str], bool]

    def foreign(
        self, folder: Path, entries: Mapping[Path, Signature], copied: Mapping[Path, Path] | None = None
    ) -> list[str]:
        """Name the entries of a folder that are not a part of what will be replaced.

        Args:
            folder (`Path`): The folder.
            entries (`Mapping[Path, Signature]`): What [`scan`] found in it.
            copied (`Mapping[Path, Path]`, *optional*):
                The files that will be copied, by their relative path: an entry with the same content is not lost.

        Returns:
            `list[str]`: The entries, as relative paths.
        """
        signed = self.sign(folder)
        found = []
        for path, signature in entries.items():
            is_file = stat.S_ISREG(signature[2])
            name = path.as_posix()
            if is_file and signed and self.is_named(folder, name):
                continue
            source = (copied or {}).get(path)
            if is_file and source is not None and filecmp.cmp(folder / path, source, shallow=False):
                continue
            found.append(name)
        return sorted(found)


def _is_model(folder: Path) -> bool:
    return _is_model_config(folder) or any((folder / name).is_file() for name in (SINGLE, INDEX))


def _is_model_config(folder: Path) -> bool:
    content = _read_object(folder / CONFIG)
    return any(key in content for key in ("model_type", "architectures", "transformers_version", MERGED))


def _is_file_of_model(folder: Path, name: str) -> bool:
    if name == CONFIG:
        return _is_model_config(folder)
    if name in _MODEL_FILES or _SHARD.fullmatch(name) or _CHAT_TEMPLATE.fullmatch(name):
        return True
    if not name.endswith(".safetensors"):
        return False
    listed = _read_object(folder / INDEX).get("weight_map")
    return isinstance(listed, dict) and name in listed.values()


def _is_adapter(folder: Path) -> bool:
    return "peft_type" in _read_object(folder / CONFIG_NAME)


def _is_file_of_adapter(folder: Path, name: str) -> bool:
    return name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, BASE_MASKS, CARD)


def _read_object(file: Path) -> dict[str, Any]:
    """The content of a JSON file; empty for anything else, which is then not known to be anybody's."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


MODEL = FolderKind("a model", _is_model, _is_file_of_model)
"""A model as Transformers saves it: the names of its formats, and the shards that the index names."""

ADAPTER = FolderKind("an adapter", _is_adapter, _is_file_of_adapter)
"""An adapter as PEFT saves it."""
