# SPDX-License-Identifier: Apache-2.0
"""
The tutorial as a notebook.

    python docs/tools/notebook.py

writes `docs/tutorial.ipynb` from `docs/tutorial.md`: its Python blocks and its commands become cells, with the output
that the page shows. A test compares the two, and another one runs the notebook.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any


PAGE = Path(__file__).parents[1] / "tutorial.md"
NOTEBOOK = PAGE.with_suffix(".ipynb")

# a fenced block, or the indented lines that show what a block prints
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```\n|^((?:    [^\n]+\n)+)", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"<!--.*?-->\n?", re.DOTALL)


def notebook(page: str) -> dict[str, Any]:
    """The notebook of a page, in version 4.5 of Jupyter's format."""
    cells: list[dict[str, Any]] = []
    text, end = "", 0
    for block in _BLOCK.finditer(page):
        text += page[end : block.start()]
        end = block.end()
        language, code, shown = block.groups()
        if language == "text" or shown:
            output = code or re.sub(r"^    ", "", shown, flags=re.MULTILINE)
            cells[-1]["outputs"] = [{"name": "stdout", "output_type": "stream", "text": _lines(output)}]
        elif language == "bash" and code.startswith("pip "):
            text += block.group()  # once, and not in every run
        else:
            _add_text(cells, text)
            text = ""
            # with `!` a command that fails would not end the notebook
            source = f"%%bash\n{code}" if language == "bash" else code
            cells.append(_cell("code", source, cells, execution_count=None, outputs=[]))
    _add_text(cells, text + page[end:])
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def _add_text(cells: list[dict[str, Any]], text: str) -> None:
    text = _COMMENT.sub("", text).strip()
    if text:
        cells.append(_cell("markdown", text, cells))


def _cell(kind: str, source: str, cells: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"cell_type": kind, "id": f"cell-{len(cells)}", "metadata": {}, "source": _lines(source.rstrip()), **more}


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def written(page: str) -> str:
    """The content of the notebook's file."""
    return json.dumps(notebook(page), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    NOTEBOOK.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
