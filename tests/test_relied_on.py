# SPDX-License-Identifier: Apache-2.0
"""What the package relies on in others beyond their documented API is still there."""

from __future__ import annotations

import importlib
import inspect
import re
from functools import reduce
from pathlib import Path

import pytest

from peft_spp.peft_version import _RELIED_ON


TEXT = (Path(__file__).parents[1] / "docs" / "contributing.md").read_text(encoding="utf-8")
TABLE = TEXT.partition("## Private names that we rely on")[2]
ROWS = re.findall(r"^\| `([\w.]+)` \| (`[^|]+) \|", TABLE, re.MULTILINE)
NAMES = [(module, name) for module, names in ROWS for name in re.findall(r"`([\w.]+)`", names)]


@pytest.mark.parametrize(("module_name", "name"), NAMES)
def test_the_name_is_there(module_name: str, name: str) -> None:
    if module_name.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    module = importlib.import_module(module_name)
    try:
        reduce(getattr, name.split("."), module)
    except AttributeError:
        # an attribute that is set on instances, or written by its name alone
        written = name.rpartition(".")[2]
        assert re.search(rf"\b{written}\b", inspect.getsource(module)), f"{module_name} has no {name} any more"


def test_the_table_is_read() -> None:
    assert len(NAMES) > 20


def test_the_names_of_peft_are_those_that_a_newer_version_is_asked_for() -> None:
    asked = {(module, name) for module, names in _RELIED_ON.items() for name in names}
    assert asked == {(module, name) for module, name in NAMES if module.startswith("peft.")}
