# SPDX-License-Identifier: Apache-2.0
"""The tutorial as a notebook: that of the page as it is now, and it runs."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from runpy import run_path

import pytest


ROOT = Path(__file__).parents[2]
TOOL = run_path(str(ROOT / "docs" / "tools" / "notebook.py"))
PAGE = TOOL["PAGE"].read_text(encoding="utf-8")


def test_the_notebook_is_that_of_the_page() -> None:
    """After a change of the page: `python docs/tools/notebook.py`."""
    assert TOOL["NOTEBOOK"].read_text(encoding="utf-8") == TOOL["written"](PAGE)


def test_every_block_of_the_page_is_in_it_once() -> None:
    cells = TOOL["notebook"](PAGE)["cells"]
    sources = {kind: ["".join(c["source"]) for c in cells if c["cell_type"] == kind] for kind in ("code", "markdown")}
    blocks = re.findall(r"^```(?:python|bash)\n(.*?)\n```$", PAGE, re.MULTILINE | re.DOTALL)
    assert blocks == [
        'pip install ".[train,plot]"',
        *(source.removeprefix("%%bash\n") for source in sources["code"]),
    ]
    shown = ["".join(line for output in c.get("outputs", []) for line in output["text"]) for c in cells]
    assert any("84 of 100 others\n" in text for text in shown) and any("all zeros kept\n" in text for text in shown)
    prose = "\n".join(sources["markdown"])
    assert prose.startswith("# Tutorial") and "<!--" not in prose and "84 of 100 others" not in prose
    assert len({c["id"] for c in cells}) == len(cells)


@pytest.mark.slow
def test_the_notebook_runs_and_prints_what_the_page_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    command = tmp_path / "bin" / "peft-spp"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "import peft_spp_command as c; c.main()" "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    book = nbformat.read(TOOL["NOTEBOOK"], as_version=4)
    nbformat.validate(book)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(
        output["text"] for cell in book.cells for output in cell.get("outputs", []) if output.get("name") == "stdout"
    )
    right = {folder: int(count) for folder, count in re.findall(r"^(\w+): .*, (\d+) of 100 others$", printed, re.M)}
    assert right["pruned"] < right["dense"] / 2 and right["merged"] > 2 * right["pruned"]
    assert "all zeros kept" in printed and re.search(r"^12 plus 7 is \d+ \.$", printed, re.M)
