# SPDX-License-Identifier: Apache-2.0
"""What a folder holds instead of what was looked for in it, for messages."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


_SHOWN = 3
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".tflite", ".ot")
# what trainers write next to weights
_STATE = re.compile(r"training_args\.bin|(optimizer|scheduler|scaler|rng_state\w*)\.(bin|pt|pth)")
_PARTS = re.compile(r"(\d+)").split


def folders_inside(folder: Path, files: Iterable[str]) -> list[Path]:
    """The folders right inside of another that hold one of the files, checkpoints in the order of their steps."""
    # Path.is_file would raise of a folder that cannot be read, as lost+found
    found = [one for one in folder.iterdir() if any(os.path.isfile(one / file) for file in files)]
    return sorted(found, key=lambda one: [part.zfill(20) if part.isdecimal() else part for part in _PARTS(one.name)])


def pass_one_of(folders: list[Path]) -> str:
    """The end of a message that tells which of the folders to pass: the last checkpoint of a run, or any."""
    if not folders:
        return ""
    if len(folders) == 1 or folders[-1].name.startswith("checkpoint-"):
        return f". Pass {folders[-1]}"
    return f". Pass one of its folders: {_names(folders)}"


def holds_adapter(folder: Path) -> bool:
    """Whether a file of a PEFT adapter is in a folder."""
    return any((folder / name).is_file() for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))


def instead_of_model(folder: Path) -> str:
    """The end of a message about a folder that holds no model: what it holds, and what to pass."""
    if holds_adapter(folder):
        return ", but an adapter: pass the model that it is for, or merge it first (peft-spp merge)"
    if models := folders_inside(folder, [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]):
        return pass_one_of(models)
    if adapters := folders_inside(folder, [CONFIG_NAME]):
        return f". It has adapters in its folders: {_names(adapters)}"
    others = sorted(
        one.name for one in folder.iterdir() if one.suffix in _OTHER_FORMATS and not _STATE.fullmatch(one.name)
    )
    if others:
        return (
            f", but {others[0]}, and only safetensors is read. Load the model and write it again with "
            "save_pretrained(folder), which writes safetensors"
        )
    return ""


def _names(folders: list[Path]) -> str:
    more = f" and {len(folders) - _SHOWN} more" if len(folders) > _SHOWN else ""
    return ", ".join(one.name for one in folders[-_SHOWN:]) + more
