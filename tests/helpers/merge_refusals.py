# SPDX-License-Identifier: Apache-2.0
"""Merges that are refused, and what is wrong with their adapter or base model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from peft_spp.merge import merge_checkpoint

from helpers.merge_cases import Case, contents


PREFIX = "base_model.model."
Q_PROJ = "model.layers.0.self_attn.q_proj"
ADAPTER, CONFIG, INDEX = "adapter_model.safetensors", "adapter_config.json", "model.safetensors.index.json"


def assert_refused(
    folder: Path,
    case: Case,
    *named: object,
    base: str | Path | None = None,
    kind: type[Exception] = ValueError,
    **options,
) -> str:
    """The merge fails with an error that names what is wrong, and no file appears, hidden ones included."""
    before = contents(folder)
    folders = sorted(folder.rglob("*"))
    with pytest.raises(kind) as error:
        merge_checkpoint(base or case.base, case.adapter, folder / "deep" / "out", **options)
    assert contents(folder) == before and sorted(folder.rglob("*")) == folders
    for what in named:
        assert str(what) in str(error.value)
    return str(error.value)


def file_of(base: Path, name: str) -> Path:
    """The file of a base model that holds a tensor."""
    return next(file for file in base.glob("*.safetensors") if name in load_file(file))


def edit_index(base: Path, **files: str) -> Path:
    """Name other files for tensors in the index of a base model."""
    content = json.loads((base / INDEX).read_text())
    content["weight_map"] |= files
    (base / INDEX).write_text(json.dumps(content))
    return base / INDEX
