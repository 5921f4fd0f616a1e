# SPDX-License-Identifier: Apache-2.0
"""The site is built strictly, whole, and loads nothing from other hosts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from peft_spp.cli import app


ROOT = Path(__file__).parents[2]
PACKAGES = ("functional", "inference", "inspection", "interchange", "merge", "planning", "pruning", "sft", "sparsity")


class Resources(HTMLParser):
    """The addresses of what a page loads, and of what it links to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.ids: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if "id" in values:
            self.ids.add(values["id"])
        if tag == "link" and values.get("rel") in ("stylesheet", "icon", "preconnect", "preload", "modulepreload"):
            self.loaded.append(values["href"])
        elif tag in ("script", "img", "iframe", "source", "video") and "src" in values:
            self.loaded.append(values["src"])


@pytest.fixture(scope="module", params=["mkdocs", "zensical"])
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    root = tmp_path_factory.mktemp("root")
    for name in ("docs", "peft_spp"):
        (root / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "mkdocs.yml", root)  # Zensical follows a link, and would build where it leads
    module_from(ROOT / "docs" / "tools" / "prepare.py").prepare(root / "build" / "docs")
    done = subprocess.run(
        [sys.executable, "-m", request.param, "build", "--strict"],
        cwd=root,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return root / "site"


def module_from(file: Path) -> Any:
    spec = spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_loads_what_it_shows_from_the_site_itself(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        for address in Resources(page).loaded:
            assert not re.match(r"(\w+:)?//", address), f"{page}: {address}"
            # the page for missing pages is shown at any depth, so its addresses begin at the root
            target = site / address.lstrip("/") if address.startswith("/") else page.parent / address
            assert target.is_file(), f"{page}: {address}"
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", style.read_text(encoding="utf-8")), style


def test_the_pictures_of_the_benchmarks_are_on_the_page(site: Path) -> None:
    wanted = re.findall(r"\]\(\.\./(benchmarks/results/.*?\.png)\)", (ROOT / "docs" / "performance.md").read_text())
    shown = Resources(site / "performance" / "index.html").loaded
    assert wanted and {f"../{picture}" for picture in wanted} <= set(shown)


def test_the_reference_has_every_public_name(site: Path) -> None:
    described = set().union(*(Resources(page).ids for page in (site / "reference").rglob("*.html")))
    wanted = {"peft_spp." + name for name in import_module("peft_spp").__all__ if name != "__version__"}
    for package in PACKAGES:
        wanted |= {f"peft_spp.{package}.{name}" for name in import_module(f"peft_spp.{package}").__all__}
    assert not wanted - described


def test_every_command_is_described(site: Path) -> None:
    page = (site / "reference" / "cli" / "index.html").read_text(encoding="utf-8")
    for name, command in get_command(app).commands.items():
        assert f"peft-spp {name}" in page
        for parameter in command.params:
            for option in parameter.opts:
                assert option in page, f"{name} {option}"


def test_the_first_picture_has_a_form_for_phones(site: Path) -> None:
    page = (site / "index.html").read_text(encoding="utf-8")
    narrow = re.search(r'<source media="\(max-width: 44em\)" srcset="([^"]+)"', page)
    assert narrow and (site / narrow[1]).is_file()


def test_preparing_again_writes_only_what_has_changed(tmp_path: Path) -> None:
    prepare = module_from(ROOT / "docs" / "tools" / "prepare.py").prepare
    prepare(tmp_path)
    assert {"changelog.md", "index.md", "site.css"} <= {path.name for path in tmp_path.iterdir()}
    assert not list(tmp_path.rglob("*.py"))
    (tmp_path / "changelog.md").write_text("old")
    (tmp_path / "gone.md").write_text("old")
    before = (tmp_path / "index.md").stat().st_mtime_ns
    prepare(tmp_path)
    assert (tmp_path / "changelog.md").read_text().startswith("# Changelog")
    assert not (tmp_path / "gone.md").exists() and (tmp_path / "index.md").stat().st_mtime_ns == before
