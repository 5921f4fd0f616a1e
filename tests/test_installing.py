# SPDX-License-Identifier: Apache-2.0
"""How to install the package: a release is told of by its version alone, and pages do not name what nobody serves."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import peft_spp._version
from peft_spp import installing
from peft_spp.compressed.changes import _ANY_NOTE, NOTE
from peft_spp.installing import how_to_install


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "benchmarks").rglob("*.md"))]


@pytest.mark.parametrize(
    ("version", "bare", "with_extra"),
    [
        ("0.1.0.dev0", "`pip install .` in a copy of", '`pip install ".[train]"` in a copy of'),
        ("0.1.0", "`pip install peft-spp`", '`pip install "peft-spp[train]"`'),
    ],
)
def test_the_version_says_how(version: str, bare: str, with_extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(peft_spp._version, "__version__", version)
        importlib.reload(installing)
        assert installing.how_to_install(code="`").startswith(bare)
        assert installing.how_to_install("train", "`").startswith(with_extra)
    importlib.reload(installing)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_pages_install_from_a_copy_until_there_is_a_release(page: Path) -> None:
    found = re.findall(r"pip install[^`\n&]*\bpeft-spp\b", page.read_text(encoding="utf-8"))
    assert installing.RELEASED or not found


def test_messages_and_cards_say_it_in_one_way() -> None:
    elsewhere = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "peft_spp").rglob("*.py")
        if re.search(r"pip install[^\n]*peft-spp", path.read_text(encoding="utf-8"))
    ]
    assert elsewhere == []


def test_a_note_of_any_version_is_taken_out_again() -> None:
    assert how_to_install(code="`") in NOTE
    for note in (NOTE, NOTE.replace(how_to_install(code="`"), "`pip install peft-spp`")):
        assert _ANY_NOTE.sub("", f"# A model\n{note}", count=1) == "# A model\n"
