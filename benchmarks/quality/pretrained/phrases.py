# SPDX-License-Identifier: Apache-2.0
"""How the page writes figures and names."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..data import UNLIKE
from ..store import Store
from .comparison import MAIN_TEXT, Comparison, Entry


def points(gain: float, error: float) -> str:
    """A difference in percentage points, with its standard error."""
    return f"{round(100 * gain, 1) + 0.0:+.1f} ± {100 * error:.1f}"


def shares(one: Comparison, entry: Entry) -> str:
    """What an entry wins back: on text like the tuning text, on other text, and of the accuracy."""
    said = [f"{one.won_back(entry, text):.0%}" for text in (MAIN_TEXT, UNLIKE)]
    return " / ".join([*said, tasks_share(one, entry)]).removesuffix(" / ")


def tasks_share(one: Comparison, entry: Entry) -> str:
    """What an entry wins back of the accuracy, if that is known."""
    if not entry.has_tasks or not math.isfinite(share := one.tasks_won_back(entry)):
        return ""
    return f"{100 * share:.0f} ± {100 * one.tasks_won_back_error(entry):.0f}%"


def series(items: Sequence[str]) -> str:
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last


def named(entries: Sequence[Entry]) -> str:
    return "; ".join(entry.label for entry in entries) or "none"


def text_name(store: Store, text: str) -> str:
    """A text that perplexity is measured on, for readers."""
    if text == MAIN_TEXT:
        return "WikiText-2" if "wikitext" in store.about["text"] else "text"
    return {"problems": "GSM8K", UNLIKE: "Python docs"}[text]
