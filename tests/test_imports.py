# SPDX-License-Identifier: Apache-2.0
"""Imports inside the package: none runs in a circle, and packages import what contributing.md says, and no more."""

from __future__ import annotations

import ast
import re
from pathlib import Path


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "peft_spp"
Module = tuple[str, ...]


def name_of(file: Path) -> Module:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


FILES = {name_of(file): file for file in PACKAGE.rglob("*.py")}


def imports_of(module: Module) -> set[Module]:
    """The modules of the package that a file imports, anywhere in it and for types only as well."""
    file = FILES[module]
    here = module if file.name == "__init__.py" else module[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            base = (*here[: len(here) - node.level + 1], *(node.module or "").split("."))
        elif (node.module or "").partition(".")[0] == "peft_spp":
            base = tuple((node.module or "").split(".")[1:])
        else:
            continue
        base = tuple(part for part in base if part)
        for alias in node.names:
            found.add((*base, alias.name) if (*base, alias.name) in FILES else base)
    return found


def test_no_imports_run_in_a_circle() -> None:
    imports = {module: imports_of(module) & FILES.keys() for module in FILES}
    # files that import no file that is left are taken away, until a circle is all that is left
    while free := {module for module, others in imports.items() if not others - {module}}:
        imports = {module: others - free for module, others in imports.items() if module not in free}
    assert not imports


def test_packages_import_what_the_table_says() -> None:
    page = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    text = page.partition("## Where things are")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]+`) \|[^|]*\|([^|]*)\|$", text, re.MULTILINE)
    allowed = {name: set(re.findall(r"`(\w+)`", may)) for names, may in rows for name in re.findall(r"`(\w+)`", names)}
    tops = {module[0] for module in FILES if module} - {"__main__"}
    assert allowed.keys() == tops
    used: dict[str, set[str]] = {top: set() for top in tops}
    for module in FILES:
        # a `__main__` starts a command
        if module and module[-1] != "__main__":
            used[module[0]] |= {other[0] if other else "__init__" for other in imports_of(module)} - {module[0]}
    assert {top: others - allowed[top] for top, others in used.items() if others - allowed[top]} == {}
