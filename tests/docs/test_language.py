# SPDX-License-Identifier: Apache-2.0
"""The pages, messages, help texts and docstrings are in plain American English."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = sorted((ROOT / "peft_spp").rglob("*.py"))

BRITISH = re.compile(
    r"\b(?:colour|behaviour|favour|neighbour|honour|labour|flavour)\w*"
    r"|\b(?:quant|optim|normal|general|organ|recogn|regular|serial|summar|util|special|parametr|vector|synchron|visual"
    r"|token|memor|minim|maxim|custom|initial)is(?:e[sdr]?|ing|ations?)\b"
    r"|\banalys(?:e|ed|ing)\b|\b(?:centre[sd]?|fibre|licence|defence|grey|maths|whilst|amongst|learnt|spelt|artefacts?)\b"
    r"|\b(?:modell|labell|travell|signall|cancell)(?:ed|ing)\b",
    re.IGNORECASE,
)
TURNS = re.compile(
    r"\bbeside\b|\btold in the same way\b|\bnothing but\b|\bculprits?\b|\bwithout a word\b|\bwhoever\b"
    r"|\bgoes before\b|\bas (?:it|they) (?:was|were)\b(?=[.,;:)])|\bcut short\b|\b(?:anew|likewise|thereby)\b"
    r"|\bin other places\b|\bfor want of\b|\bwhich (?:is|are) none\b"
    r"|\bis no (?:adapter|model|multiple|number)\b|\b(?:is|are) told by\b",
    re.IGNORECASE,
)


def texts(file: Path) -> Iterator[tuple[int, str]]:
    """The lines of a page outside of blocks of code, or the strings of a module, with the numbers of their lines."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        # names of tests, files and variables are not prose; the lines stay where they are
        text = re.sub(r"```.*?```", lambda block: "\n" * block[0].count("\n"), text, flags=re.DOTALL)
        yield from enumerate(re.sub(r"`[^`\n]*`", "", text).splitlines(), 1)
    else:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.lineno, " ".join(node.value.split())


def found(file: Path) -> list[str]:
    return [
        f"{file.relative_to(ROOT)}:{line}: {match[0]}"
        for line, text in texts(file)
        for pattern in (BRITISH, TURNS)
        for match in pattern.finditer(text)
    ]


@pytest.mark.parametrize("files", [PAGES, MODULES], ids=["pages", "modules"])
def test_the_texts_are_in_plain_american_english(files: list[Path]) -> None:
    assert len(files) > 20
    assert not [one for file in files for one in found(file)]


@pytest.mark.parametrize(
    "wrong",
    [
        "The behaviour of a quantised layer.",
        "`r` has the value 0, which is none.",
        "An adapter that is cut short is no adapter.",
        "The message names the culprit.",
        "The folder stays as it was.",
        "Which of them not, told in the same way.",
    ],
)
def test_a_wrong_text_is_found(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    page, module = tmp_path / "page.md", tmp_path / "module.py"
    page.write_text(f"# A page\n\n{wrong}\n")
    module.write_text(f'def one():\n    """A function."""\n    raise ValueError({wrong!r})\n')
    assert found(page)[0].startswith("page.md:3: ") and found(module)[0].startswith("module.py:3: ")
    page.write_text(f"```python\n# {wrong}\n```\n\nColors, three of its neighbors, and a promise as it was made.\n")
    assert not found(page)
