# SPDX-License-Identifier: Apache-2.0
"""Model cards as people have written them: whatever a card holds, it can be read, added to and written again."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from ..installing import how_to_install


_INVITATION = "To fine-tune it and keep it as sparse, use [SPP](https://arxiv.org/abs/2405.16057) ({})."
INVITATION = _INVITATION.format(how_to_install(code="`"))
"""How a pruned model's card ends; once it is fine-tuned, it does not say so any more."""
# an earlier version may have told of another way to install
_ANY_INVITATION = re.compile(re.escape(_INVITATION).replace(re.escape("{}"), "[^)]*"))

_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)


def without_invitation(text: str) -> str:
    """The text of a card without how a pruned model's ends."""
    return _ANY_INVITATION.sub("", text)


@dataclass
class Card:
    """A model card."""

    data: dict[str, Any] = field(default_factory=dict)  # its metadata
    text: str = ""

    def add_tags(self, tags: Iterable[str]) -> None:
        """Add tags to those that are there, which become strings, as the Hub wants them."""
        present = self.data.get("tags")
        listed = present if isinstance(present, list) else [present]
        # YAML reads `no` and `on` as false and true
        kept = {str(tag).lower() if isinstance(tag, bool) else str(tag) for tag in listed if _is_scalar(tag)}
        self.data["tags"] = sorted({*kept, *tags})

    def __str__(self) -> str:
        head = yaml.safe_dump(self.data, sort_keys=False, allow_unicode=True) if self.data else ""
        # half of a surrogate pair stands for a byte of a file name that is not UTF-8
        return f"---\n{head}---\n\n{self.text.strip()}\n".encode("utf-8", "backslashreplace").decode()


def read_card(file: Path) -> Card:
    """Read a card, which must not end a run: what cannot be read of it is left out with a warning."""
    if not file.is_file():
        return Card()
    try:
        content = file.read_bytes()
    except OSError as error:
        _warn(file, f"cannot be read ({error.strerror})")
        return Card()
    try:
        text = content.decode("utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
        _warn(file, "is not in UTF-8, and is read as Latin-1", left_out=False)
    text = "".join(one for one in text.replace("\r\n", "\n") if one >= " " or one in "\n\t")
    match = _FRONT_MATTER.match(text)
    if match is None:
        return Card(text=text.strip())
    rest = text[match.end() :].strip()
    try:
        data = yaml.safe_load(match[1])
        if data is None or not isinstance(data, dict):
            # a line of dashes is a rule in Markdown too
            return Card(text=rest if data is None else text.strip().removeprefix("---").strip())
        yaml.safe_dump(data)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        _warn(file, f"has metadata that are not valid YAML ({' '.join(str(error).split())})")
        return Card(text=rest)
    return Card(data, rest)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (str, int, float))


def _warn(file: Path, problem: str, left_out: bool = True) -> None:
    consequence = ": that part is left out of the new card" if left_out else ""
    warnings.warn(f"The model card {file} {problem}{consequence}.", stacklevel=4)
