# SPDX-License-Identifier: Apache-2.0
"""
What the tests do with the code blocks of a page.

Python blocks run, one after another in one namespace, in a folder with small models under the names that the pages
use. A comment above a block that no reader sees says why it does not run:

    <!-- not run: it needs a GPU -->

Such a block is compiled, what it imports has to be there, and calls of what it imports have to take the keyword
arguments that they are given. Commands are parsed by the commands themselves. Below `<!-- commands run -->` those of
peft-spp run too, and a block of text after them has to be what they print, figures and spaces aside.
"""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

from helpers.page_commands import check_command, run_command


NOT_RUN = re.compile(r"<!-- not run: (?P<reason>[^>]+) -->\s*\Z")
COMMANDS_RUN = "<!-- commands run -->"
# what pages tell of and the tests do not have
NOT_INSTALLED = {"sentence_transformers", "swift"}
LANGUAGES = {"python", "bash", "text", "bibtex", "yaml"}
FENCE = re.compile(r"^\s*```(\w+)", re.MULTILINE)


def reason_not_to_run(example: Example) -> str | None:
    """What the comment above a block says."""
    found = NOT_RUN.search(example.document.text, 0, example.region.start)
    return found["reason"] if found else None


class PythonBlocks(CodeBlockParser):
    language = "python"

    def evaluate(self, example: Example) -> None:
        if reason_not_to_run(example):
            check_python(example.parsed, example.namespace)
        else:
            PythonEvaluator()(example)


class Commands(CodeBlockParser):
    language = "bash"

    def evaluate(self, example: Example) -> None:
        runs = COMMANDS_RUN in example.document.text[: example.region.start]
        printed = []
        for words in command_lines(example.parsed):
            check_command(words)
            if runs and words[0] == "peft-spp":
                printed.append(run_command(words))
        example.namespace["printed"] = "\n".join(printed)


class Output(CodeBlockParser):
    language = "text"

    def evaluate(self, example: Example) -> str | None:
        printed = example.namespace.pop("printed", "")
        if not printed or COMMANDS_RUN not in example.document.text[: example.region.start]:
            return None
        shown, real = shape(example.parsed), shape(printed)
        missing = [line for line in shown if line not in real]
        return f"not printed: {missing}\nprinted:\n{printed}" if missing else None


PAGES = Sybil(parsers=[PythonBlocks(), Commands(), Output()])


def command_lines(text: str) -> Iterator[list[str]]:
    """The words of each command of a block."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words:
            yield words[: words.index("&&")]
            words = words[words.index("&&") + 1 :]
        if words:
            yield words


def shape(text: str) -> list[str]:
    """The lines of a text without figures, folders, lines of tables and spaces, and without empty ones."""
    lines = (re.sub(r"\S*/(?=\w+$)", "", line.rstrip()) for line in text.splitlines())
    lines = (re.sub(r"[\s─]+", " ", re.sub(r"\d[\d.,]*", "0", line)).strip() for line in lines)
    return [line for line in lines if line and line != "..."]


def check_python(source: str, namespace: dict[str, Any]) -> None:
    """Compile a block, import what it imports, and check the keyword arguments of calls of what is known then."""
    tree = ast.parse(source)
    names = dict(namespace)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in NOT_INSTALLED:
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            exec(compile(ast.Module([node], []), "<import>", "exec"), names)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (called := resolve(node.func, names)) is not None:
            check_keywords(called, [keyword.arg for keyword in node.keywords if keyword.arg])


def resolve(node: ast.expr, names: dict[str, Any]) -> Any:
    """What an expression such as `a.b` names, if that can be told without running anything."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and (owner := resolve(node.value, names)) is not None:
        return getattr(owner, node.attr)
    return None


def check_keywords(called: Any, keywords: list[str]) -> None:
    parameters = inspect.signature(called).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    unknown = [] if takes_all else sorted(set(keywords) - set(parameters))
    assert not unknown, f"{called} does not take {unknown}"


def languages(page: Path) -> list[str]:
    """The languages of the fenced blocks of a page."""
    return FENCE.findall(page.read_text(encoding="utf-8"))
