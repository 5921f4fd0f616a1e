# SPDX-License-Identifier: Apache-2.0
"""Reads docstrings in the Hugging Face style: links such as [`SPPConfig`], and types in backticks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe


# the packages whose public names the reference describes, the shortest path to a name first
PACKAGES = (
    "functional",
    "sparsity",
    "merge",
    "pruning",
    "planning",
    "interchange",
    "inspection",
    "inference",
    "compressed",
    "tuner",
)
LINK = re.compile(r"\[`~?([\w.]+)`\](?![\[(])")
# "name (`type`, *optional*, defaults to `0`): ..." and, of what is returned, "`type`: ..."; signatures have defaults
PARAMETER = re.compile(r"^(\s*\**\w+ )\((.+?)(?:, [*`]optional[*`].*?)?\):", re.MULTILINE)
RETURNED = re.compile(r"((?:Returns|Yields):\n\s+)`([^`]+)`:")


class HuggingFaceStyle(griffe.Extension):
    """Takes types out of their backticks, and links [`name`] to what the reference describes under that name."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Rewrite the docstrings of a package that has been loaded."""
        targets = dict(_public_names(pkg))
        for obj in _objects(pkg):
            if obj.docstring is not None:
                text = PARAMETER.sub(lambda match: f"{match[1]}({_plain(match[2])}):", obj.docstring.value)
                text = RETURNED.sub(r"\1\2:", text)
                obj.docstring.value = LINK.sub(lambda match: _link(match[1], targets), text)


def _public_names(pkg: griffe.Module) -> Iterator[tuple[str, str]]:
    modules = [*(pkg[name] for name in reversed(PACKAGES)), pkg]
    for module in modules:
        for name in map(str, module.exports or ()):
            path = f"{module.path}.{name}"
            yield from ((name, path), (path, path))


def _objects(obj: griffe.Object) -> Iterator[griffe.Object]:
    yield obj
    for member in obj.members.values():
        if not member.is_alias:
            yield from _objects(member)


def _plain(type_: str) -> str:
    return LINK.sub(r"\1", type_).replace("`", "")


def _link(name: str, targets: dict[str, str]) -> str:
    whole, _, method = name.rpartition(".")
    target = targets.get(name) or (f"{targets[whole]}.{method}" if whole in targets else None)
    return f"[`{name.rpartition('peft_spp.')[2]}`][{target}]" if target else f"`{name}`"
