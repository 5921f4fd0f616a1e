# SPDX-License-Identifier: Apache-2.0
"""Data of `peft-spp sft`, and what it says if it refuses a command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peft_spp.sft.errors import InputError
from peft_spp.sft.run import main

from helpers.trl_cases import TEXTS


ROWS = [{"text": text} for text in TEXTS]


def write_jsonl(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def refusal(*args: str) -> str:
    """The error of a command line that is refused."""
    with pytest.raises(InputError) as error:
        main(args)
    return str(error.value)
