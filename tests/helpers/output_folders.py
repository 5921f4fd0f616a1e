# SPDX-License-Identifier: Apache-2.0
"""Output folders with an old model or adapter in them, which are replaced."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from peft_spp.checkpoints.output import OutputFolder
from peft_spp.checkpoints.own_files import ADAPTER, MODEL, FolderKind


OLD = {
    MODEL: {
        "config.json": '{"model_type": "llama"}',
        "model.safetensors.index.json": '{"weight_map": {"a": "part-a.safetensors", "b": "sub/b.safetensors"}}',
        "part-a.safetensors": "old",
        "sub/b.safetensors": "old",
        "tokenizer.json": "old",
        "README.md": "old",
        "additional_chat_templates/tool.jinja": "old",
    },
    ADAPTER: {
        "adapter_config.json": '{"peft_type": "SPP"}',
        "adapter_model.safetensors": "old",
        "README.md": "old",
    },
}
NEW = {"config.json": "new", "sub/more.json": "new", "model.safetensors": "new", "README.md": "new"}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def everything(folder: Path) -> dict[str, str]:
    """All files, links and empty folders below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[name] = path.read_text()
        elif not any(path.iterdir()):
            found[name] = "empty"
    return found


def replace(path: Path, kind: FolderKind, before_publishing: Callable[[], object] = lambda: None) -> None:
    out = OutputFolder(path, overwrite=True, kind=kind)
    out.check(100)
    with out:
        for name, text in NEW.items():
            out.new_file(Path(name)).write_text(text)
        before_publishing()
        out.publish()
