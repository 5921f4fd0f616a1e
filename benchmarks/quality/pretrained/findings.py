# SPDX-License-Identifier: Apache-2.0
"""What the page says first: its findings, in a table and sentences."""

from __future__ import annotations

from collections.abc import Sequence

from ..data import UNLIKE
from ..store import Store
from ..tables import table
from .comparison import MAIN_TEXT, Comparison, Entry
from .phrases import points, series, tasks_share, text_name


Told = Sequence[tuple[Comparison, Entry]]
"""Of each pruning the first copy, and SPP on it."""


def _tell(comparisons: Sequence[Comparison]) -> Told:
    """What the first table and the sentences are of."""
    return [(one, spp) for one in comparisons if not one.copy and (spp := one.spp) is not None]


def findings_table(store: Store, comparisons: Sequence[Comparison]) -> str:
    """What pruning took and SPP won back, a row for each pruning."""
    told = _tell(comparisons)
    if not told:
        return ""
    won_back = [f"{text_name(store, text)} won back" for text in (MAIN_TEXT, UNLIKE)]
    headings = ["", "accuracy lost, points", "accuracy won back", *won_back, "accuracy won back, distilled"]
    rows = []
    for one, spp in told:
        texts = [f"{one.won_back(spp, text):.0%}" for text in (MAIN_TEXT, UNLIKE)]
        taken = points(*one.dense.gain(one.pruned)).removeprefix("+")
        best = _distilled(one)
        rows.append([one.pruning.label, taken, tasks_share(one, spp), *texts, tasks_share(one, best) if best else "–"])
    return table(headings, rows, numbers_from=1)


def findings(store: Store, comparisons: Sequence[Comparison]) -> list[str]:
    """What the table means for a user, in five sentences."""
    told = _tell(comparisons)
    if not told:
        return []
    return [
        _zeros_sentence(store, told, comparisons),
        _regained_sentence(told),
        *_standing_sentence(told),
        _text_sentence(store, told),
        *_recipes_sentence(store, told),
    ]


def _zeros_sentence(store: Store, told: Told, comparisons: Sequence[Comparison]) -> str:
    """That SPP keeps the zeros, and what becomes of a LoRA."""
    models = [deployed for one in comparisons for entry in one.spp_entries for deployed in entry.deployed]
    zeros = sum(one["zeros_lost"] or 0 for one in models)
    said = f"SPP's {len(models)} tuned models {f'lost {zeros:,} zeros' if zeros else 'kept every zero'}"
    loras = [lora for one, _ in told if (lora := one.find("lora")) is not None]
    if loras:
        said += f"; merging a LoRA lost {loras[0].zeros_lost:,}"
    behind = [
        (one.won_back(spp, MAIN_TEXT), one.won_back(lora, MAIN_TEXT), one.pruning.label)
        for one, spp in told
        if (lora := one.find("lora", "remasked")) is not None
    ]
    own, remasked, label = max(behind, key=lambda pair: pair[0] - pair[1], default=(0.0, 0.0, ""))
    if own > remasked:
        said += (
            f", and masked again it falls behind most at {label}, with {remasked:.0%} of the log-perplexity on "
            f"{text_name(store, MAIN_TEXT)} won back where SPP wins back {own:.0%}"
        )
    return f"{said}."


def _regained_sentence(told: Told) -> str:
    """Where SPP wins back accuracy."""
    sure = [one.pruning.label for one, spp in told if spp.certain_gain(one.pruned) > 0]
    unsure = [one.pruning.label for one, _ in told if one.pruning.label not in sure]
    said = [f"SPP raises the accuracy at {series(sure)}"] if sure else []
    if unsure:
        questions = told[0][0].questions
        does = "it does" if sure else "SPP raises the accuracy"
        said.append(f"{questions:,} questions do not show that {does} at {series(unsure)}")
    return f"In {told[0][1].tuned['tokens']:,} tokens of plain text {'; '.join(said)}."


def _standing_sentence(told: Told) -> list[str]:
    """Which of the others that keep the zeros are more or less accurate than SPP."""
    compared = [(one, spp) for one, spp in told if one.rivals]
    if not compared:
        return []
    found: dict[str, list[str]] = {"more": [], "less": []}
    for one, spp in compared:
        for names, entries in zip(found.values(), one.standing(spp), strict=True):
            names += [f"{entry.label} at {one.pruning.label}" for entry in entries]
    counts = series([f"{len(one.rivals)} at {one.pruning.label}" for one, _ in compared])
    if not any(found.values()):
        said = "the accuracy of none differs from SPP's by over two standard errors"
    else:
        said = " and ".join(
            f"{'; '.join(names) or 'none'} {'are' if len(names) > 1 else 'is'} {word} accurate than SPP by over two "
            "standard errors"
            for word, names in found.items()
        )
    return [f"Of the other methods that keep the zeros ({counts}), {said}."]


def _text_sentence(store: Store, told: Told) -> str:
    """That perplexity on text like the tuning text tells little of other text."""
    like, unlike = ([one.won_back(spp, text) for one, spp in told] for text in (MAIN_TEXT, UNLIKE))
    return (
        f"Of the log-perplexity SPP wins back {_span(like)} on {text_name(store, MAIN_TEXT)}, which is like the "
        f"tuning text, and {_span(unlike)} on {text_name(store, UNLIKE)}, which are not: tune on text like what the "
        "model will read."
    )


def _span(shares: Sequence[float]) -> str:
    lowest, highest = f"{min(shares):.0%}", f"{max(shares):.0%}"
    return lowest if lowest == highest else f"{lowest} to {highest}"


def _recipes_sentence(store: Store, told: Told) -> list[str]:
    """What the tasks' own questions as tuning text, and the dense model as a teacher, change."""
    said = []
    asked = [(one, one.tuned_on_tasks[0]) for one, _ in told if one.tuned_on_tasks]
    if asked:
        one, entry = asked[0]
        said.append(
            f"the tasks' own training questions as half of the tuning text win back {tasks_share(one, entry)} of the "
            f"accuracy at {one.pruning.label}"
        )
    taught = [(one, spp, best) for one, spp in told if (best := _distilled(one)) is not None]
    if taught:
        with_teacher, without = (
            _span([one.won_back(entry, UNLIKE) for one, entry in pairs])
            for pairs in ([(one, best) for one, _, best in taught], [(one, spp) for one, spp, _ in taught])
        )
        said.append(
            f"distilling the dense model wins back {with_teacher} on {text_name(store, UNLIKE)}, where plain text "
            f"does {without}"
        )
    text = "; ".join(said)
    return [f"{text[0].upper()}{text[1:]}."] if said else []


def _distilled(one: Comparison) -> Entry | None:
    """SPP, distilled from the dense model: the variant that is best on text unlike the tuning text."""
    entries = [entry for entry in one.spp_entries if entry.settings["options"].get("teacher") and not entry.gave_way]
    return max(entries, key=lambda entry: one.won_back(entry, UNLIKE), default=None)
