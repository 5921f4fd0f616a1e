# SPDX-License-Identifier: Apache-2.0
"""
The pages as the site's builder takes them: `python docs/tools/prepare.py`, before `mkdocs` or `zensical`.

It writes `build/docs`: what is in `docs/`, the changelog, what the pages show of the benchmarks, and the page of the
command line from the commands themselves. Only files that differ are written, so that a server sees what has changed.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[2]
OUT = ROOT / "build" / "docs"
# pages link to these as they lie in the repository, so that the links work there too
OUTSIDE = ("benchmarks/results/**/*.png", "benchmarks/configs/*.yaml")
COMMANDS_MARK = "<!-- the commands -->"


def prepare(out: Path = OUT) -> None:
    """
    Write the folder that the site is built from.

    Args:
        out (`Path`): The folder; files that do not belong there are removed.
    """
    files = sources()
    for path in [path for path in out.rglob("*") if path.is_file()]:
        if path.relative_to(out).as_posix() not in files:
            path.unlink()
    for uri, source in files.items():
        content = source.read_bytes()
        if source.suffix == ".md":
            content = page(source.read_text(encoding="utf-8"), depth=uri.count("/")).encode()
        target = out / uri
        if not target.is_file() or target.read_bytes() != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)


def sources() -> dict[str, Path]:
    """Where each file of the site comes from."""
    docs = ROOT / "docs"
    found = {
        path.relative_to(docs).as_posix(): path
        for path in sorted(docs.rglob("*"))
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    found["changelog.md"] = ROOT / "CHANGELOG.md"
    for path in sorted(path for pattern in OUTSIDE for path in ROOT.glob(pattern)):
        found[path.relative_to(ROOT).as_posix()] = path
    return found


def page(markdown: str, depth: int) -> str:
    """A page with its links to the benchmarks pointing at the files next to it, and with the commands filled in."""
    markdown = markdown.replace(f"]({'../' * (depth + 1)}benchmarks/", f"]({'../' * depth}benchmarks/")
    return markdown.replace(COMMANDS_MARK, commands()) if COMMANDS_MARK in markdown else markdown


def commands() -> str:
    """The help of all commands as Markdown, from the commands themselves."""
    arguments = [sys.executable, "-m", "typer", "peft_spp.cli", "utils", "docs", "--name", "peft-spp"]
    text = subprocess.run(arguments, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    # the page has a title already, and the list of commands stands above
    return re.sub(r"^# `peft-spp`\n", "", text)


if __name__ == "__main__":
    prepare()
