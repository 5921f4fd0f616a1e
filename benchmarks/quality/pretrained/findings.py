# SPDX-License-Identifier: Apache-2.0
"""What the page says first: its findings, in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from ..data import UNLIKE
from ..store import Store
from .comparison import MAIN_TEXT, Comparison, Entry
from .phrases import points, series, tasks_share, text_name


Told = Sequence[tuple[Comparison, Entry]]
"""Of each pruning the first copy, and SPP on it."""


def findings(store: Store, comparisons: Sequence[Comparison]) -> list[str]:
    """What a user should know, in five sentences."""
    told = [(one, spp) for one in comparisons if not one.copy and (spp := one.spp) is not None]
    if not told:
        return []
    return [
        _loss_sentence(told),
        _regained_sentence(told, comparisons),
        *_standing_sentence(told),
        _text_sentence(store, told),
        *_recipes_sentence(store, *told[0]),
    ]


def _loss_sentence(told: Told) -> str:
    """What pruning took of the tasks."""
    accuracy = told[0][0].dense.accuracy
    lost = [f"{points(*one.dense.gain(one.pruned)).removeprefix('+')} at {one.pruning.label}" for one, _ in told]
    return f"Of a mean accuracy of {accuracy:.1%} in the tasks, pruning takes {series(lost)}, in points."


def _regained_sentence(told: Told, comparisons: Sequence[Comparison]) -> str:
    """How much of the accuracy SPP wins back, and that it keeps the zeros."""
    said = series([f"{tasks_share(one, spp)} at {one.pruning.label}" for one, spp in told])
    unsure = [one for one, spp in told if not spp.certain_gain(one.pruned)]
    if unsure:
        labels = series([one.pruning.label for one in unsure])
        said += f" ({unsure[0].questions:,} questions do not tell it from nothing at {labels})"
    models = [deployed for one in comparisons for entry in one.spp_entries for deployed in entry.deployed]
    zeros = sum(one["zeros_lost"] or 0 for one in models)
    kept = f"lost {zeros:,} zeros" if zeros else "kept every zero"
    loras = [lora for one, _ in told if (lora := one.find("lora")) is not None]
    lost = f", where merging a LoRA lost {loras[0].zeros_lost:,}" if loras else ""
    tokens = told[0][1].tuned["tokens"]
    return f"In {tokens:,} tokens SPP wins back {said}; its tuned models ({len(models)}) {kept}{lost}."


def _standing_sentence(told: Told) -> list[str]:
    """Which of the others that keep the zeros are more or less accurate than SPP."""
    compared = [(one, spp) for one, spp in told if one.rivals]
    if not compared:
        return []
    found: dict[str, list[str]] = {"more": [], "less": []}
    for one, spp in compared:
        for names, entries in zip(found.values(), one.standing(spp), strict=True):
            names += [f"{entry.label} at {one.pruning.label}" for entry in entries]
    said = [
        f"{'; '.join(names) or 'none'} {'are' if len(names) > 1 else 'is'} {word} accurate"
        for word, names in found.items()
    ]
    counts = series([f"{len(one.rivals)} at {one.pruning.label}" for one, _ in compared])
    return [
        f"Of the other methods that keep the zeros ({counts}), {' and '.join(said)} than SPP by over two standard "
        "errors."
    ]


def _text_sentence(store: Store, told: Told) -> str:
    """That perplexity on text like the tuning text tells little of other text."""
    like, unlike = (
        series([f"{one.won_back(spp, text):.0%} at {one.pruning.label}" for one, spp in told])
        for text in (MAIN_TEXT, UNLIKE)
    )
    return (
        f"Of the log-perplexity SPP wins back {like} on {text_name(store, MAIN_TEXT)}, which is like the tuning text, "
        f"but {unlike} on {text_name(store, UNLIKE)}, which are not: tune on text like what the model will read."
    )


def _recipes_sentence(store: Store, one: Comparison, spp: Entry) -> list[str]:
    """What the tasks' own questions as tuning text, and the dense model as a teacher, change."""
    said = []
    asked = one.tuned_on_tasks
    if asked:
        said.append(
            f"the tasks' own training questions as half of the tuning text win back {tasks_share(one, asked[0])} of "
            "the accuracy"
        )
    distilled = [entry for entry in one.spp_entries if entry.settings["options"].get("teacher")]
    if distilled:
        best = max(distilled, key=lambda entry: one.won_back(entry, UNLIKE))
        said.append(
            f"distilling the dense model wins back {one.won_back(best, UNLIKE):.0%} on {text_name(store, UNLIKE)} and "
            f"{one.won_back(best, MAIN_TEXT):.0%} on {text_name(store, MAIN_TEXT)}"
            + (f", and {share} of the accuracy" if (share := tasks_share(one, best)) else "")
        )
    return [f"At {one.pruning.label}, {'; '.join(said)}."] if said else []
