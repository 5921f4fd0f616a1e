# SPDX-License-Identifier: Apache-2.0
"""Which files of an output folder are a model's or an adapter's, so that a new one may take their place."""

from __future__ import annotations

import filecmp
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from .merged import MERGED
from .safetensors_files import INDEX, INDEX_SUFFIX, SINGLE


Signature = tuple[int, int, int, int, int]
"""What tells whether an entry of a folder is still the one that was there: device, inode, mode, size and time."""

BASE_MASKS = "base_masks.json"
"""The file next to an adapter's `adapter_config.json` that holds the record of its base model."""

CARD = "README.md"
CONFIG = "config.json"
# the root of a file system may have it, and nobody but the file system writes there
_OF_FILE_SYSTEM = "lost+found"
_CHAT_TEMPLATE = re.compile(r"additional_chat_templates/[^/]+\.jinja")
_MODEL_FILES = frozenset(
    {
        CONFIG,
        "generation_config.json",
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
    """List all that a folder holds: files, links (not what they lead to) and empty folders."""
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
    """What a folder is written as, which tells the files in it that are replaced from those that are not."""

    what: str  # what to call it
    sign: Callable[[Path], bool]  # whether a folder holds one
    own: Callable[[Path, Iterable[str]], set[str]]  # which of the relative names in a folder are a part of it

    def foreign(
        self, folder: Path, entries: Mapping[Path, Signature], copied: Mapping[Path, Path] | None = None
    ) -> list[str]:
        """Name the entries of a folder that are not a part of what will be replaced."""
        own = self.own(folder, [path.as_posix() for path in entries]) if self.sign(folder) else set()
        found = []
        for path, signature in entries.items():
            is_file = stat.S_ISREG(signature[2])
            name = path.as_posix()
            if is_file and name in own:
                continue
            source = (copied or {}).get(path)
            if is_file and source is not None and filecmp.cmp(folder / path, source, shallow=False):
                continue
            found.append(name)
        return sorted(found)


def _is_model(folder: Path) -> bool:
    config = _read_object(folder / CONFIG)
    # a configuration alone, with a text next to it, may be another program's
    return any(key in config for key in ("model_type", "architectures", "transformers_version", MERGED)) and any(
        os.path.isfile(folder / name) for name in _weight_files(folder)
    )


def _files_of_model(folder: Path, names: Iterable[str]) -> set[str]:
    known = _MODEL_FILES | _weight_files(folder)
    return {name for name in names if name in known or _CHAT_TEMPLATE.fullmatch(name)}


def _weight_files(folder: Path) -> set[str]:
    """The names of the weight files that Transformers loads from a folder, whether or not they are there."""
    named = _read_object(folder / CONFIG).get("transformers_weights")
    found = {SINGLE, INDEX}
    if isinstance(named, str) and named.endswith((".safetensors", INDEX_SUFFIX)):
        found.add(named)
    for index in [name for name in found if name.endswith(INDEX_SUFFIX)]:
        listed = _read_object(folder / index).get("weight_map")
        shards = listed.values() if isinstance(listed, dict) else ()
        place = Path(index).parent
        found |= {(place / one).as_posix() for one in shards if isinstance(one, str) and one.endswith(".safetensors")}
    return found


def _is_adapter(folder: Path) -> bool:
    return "peft_type" in _read_object(folder / CONFIG_NAME)


def _files_of_adapter(folder: Path, names: Iterable[str]) -> set[str]:
    return {CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, BASE_MASKS, CARD}.intersection(names)


def _read_object(file: Path) -> dict[str, Any]:
    """The content of a JSON file; empty for anything else, which is then not known to be anybody's."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


MODEL = FolderKind("a model", _is_model, _files_of_model)
"""A model as Transformers saves it: the names of its formats, and the shards that the index names."""

ADAPTER = FolderKind("an adapter", _is_adapter, _files_of_adapter)
"""An adapter as PEFT saves it."""
