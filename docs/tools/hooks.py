# SPDX-License-Identifier: Apache-2.0
"""Hooks of the site's build: files from outside `docs/`, and the page of the command line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


ROOT = Path(__file__).parents[2]
# pages link to these as they lie in the repository, so that the links work there too
OUTSIDE = ("benchmarks/results/**/*.png", "benchmarks/configs/*.yaml")
COMMANDS_MARK = "<!-- the commands -->"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the changelog, and what the pages show of the benchmarks."""
    files.append(File.generated(config, "changelog.md", abs_src_path=str(ROOT / "CHANGELOG.md")))
    for path in sorted(path for pattern in OUTSIDE for path in ROOT.glob(pattern)):
        uri = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to the benchmarks at the files that were added, and fill in the commands."""
    depth = page.file.src_uri.count("/")
    markdown = markdown.replace(f"]({'../' * (depth + 1)}benchmarks/", f"]({'../' * depth}benchmarks/")
    return markdown.replace(COMMANDS_MARK, commands()) if COMMANDS_MARK in markdown else markdown


def commands() -> str:
    """The help of all commands as Markdown, from the commands themselves."""
    arguments = [sys.executable, "-m", "typer", "peft_spp.cli", "utils", "docs", "--name", "peft-spp"]
    text = subprocess.run(arguments, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    # the page has a title already, and the list of commands stands above
    return re.sub(r"^# `peft-spp`\n", "", text)
