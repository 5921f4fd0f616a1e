# SPDX-License-Identifier: Apache-2.0
"""What the page of a pretrained model says first: its findings, in sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .data import UNLIKE
from .pretrained_results import METRIC, Comparison, Entry
from .store import Store


MAIN_TEXT = "text"


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


def findings(store: Store, comparisons: Sequence[Comparison]) -> list[str]:
    """What a user should know, in five sentences."""
    told = [(one, spp) for one in comparisons if not one.copy and (spp := main_entry(one)) is not None]
    if not told:
        return []
    return [
        _loss_sentence(told),
        _regained_sentence(told, comparisons),
        *_standing_sentence(told),
        _text_sentence(store, told),
        *_recipes_sentence(store, *told[0]),
    ]


def details(store: Store, one: Comparison) -> list[str]:
    """How SPP compares with the others on one pruned model."""
    spp = main_entry(one)
    if spp is None:
        return []
    return [
        *_undecided_sentence(one),
        *_rivals_sentences(store, one, spp),
        *_why_sentences(one, spp),
        *_probability_sentence(one),
        *_equal_sentence(store, one, spp),
        *_start_sentence(store, one),
    ]


def main_entry(one: Comparison) -> Entry | None:
    """SPP as it is compared with the others."""
    return one.find("spp") or one.find("spp_positive")


def spp_entries(one: Comparison) -> list[Entry]:
    """The contenders that are SPP, with whatever settings."""
    return [entry for entry in one.entries if entry.settings["method"].startswith("spp")]


Told = Sequence[tuple[Comparison, Entry]]
"""Of each pruning the first copy, and SPP on it."""


def _loss_sentence(told: Told) -> str:
    """What pruning took of the tasks."""
    accuracy = told[0][0].dense.accuracy
    lost = [f"{points(*one.dense.gain(one.pruned)).removeprefix('+')} at {one.pruning.label}" for one, _ in told]
    return f"Of a mean accuracy of {accuracy:.1%} in the tasks, pruning takes {_series(lost)}, in points."


def _regained_sentence(told: Told, comparisons: Sequence[Comparison]) -> str:
    """How much of the accuracy SPP wins back, and that it keeps the zeros."""
    said = _series([f"{tasks_share(one, spp)} at {one.pruning.label}" for one, spp in told])
    unsure = [one for one, spp in told if not _certain(spp, one.pruned)]
    if unsure:
        labels = _series([one.pruning.label for one in unsure])
        said += f" ({_questions(unsure[0]):,} questions do not tell it from nothing at {labels})"
    models = [deployed for one in comparisons for entry in spp_entries(one) for deployed in entry.deployed]
    zeros = sum(one["zeros_lost"] or 0 for one in models)
    kept = f"lost {zeros:,} zeros" if zeros else "kept every zero"
    loras = [lora for one, _ in told if (lora := one.find("lora")) is not None]
    lost = f", where merging a LoRA lost {loras[0].zeros_lost:,}" if loras else ""
    tokens = told[0][1].tuned["tokens"]
    return f"In {tokens:,} tokens SPP wins back {said}; its tuned models ({len(models)}) {kept}{lost}."


def _series(items: Sequence[str]) -> str:
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last


def _questions(one: Comparison) -> int:
    return sum(len(scores[f"{METRIC} right"]) for scores in one.pruned.deployed[0]["tasks"].values())


def _standing_sentence(told: Told) -> list[str]:
    """Which of the others that keep the zeros are more or less accurate than SPP."""
    compared = [(one, spp, rivals) for one, spp in told if (rivals := _rivals(one))]
    if not compared:
        return []
    found: dict[str, list[str]] = {"more": [], "less": []}
    for one, spp, rivals in compared:
        for names, entries in zip(found.values(), _standing(spp, rivals), strict=True):
            names += [f"{entry.label} at {one.pruning.label}" for entry in entries]
    said = [
        f"{'; '.join(names) or 'none'} {'are' if len(names) > 1 else 'is'} {word} accurate"
        for word, names in found.items()
    ]
    counts = _series([f"{len(rivals)} at {one.pruning.label}" for one, _, rivals in compared])
    return [
        f"Of the other methods that keep the zeros ({counts}), {' and '.join(said)} than SPP by over two standard "
        "errors."
    ]


def _text_sentence(store: Store, told: Told) -> str:
    """That perplexity on text like the tuning text tells little of other text."""
    like, unlike = (
        _series([f"{one.won_back(spp, text):.0%} at {one.pruning.label}" for one, spp in told])
        for text in (MAIN_TEXT, UNLIKE)
    )
    return (
        f"Of the log-perplexity SPP wins back {like} on {text_name(store, MAIN_TEXT)}, which is like the tuning text, "
        f"but {unlike} on {text_name(store, UNLIKE)}, which are not: tune on text like what the model will read."
    )


def _recipes_sentence(store: Store, one: Comparison, spp: Entry) -> list[str]:
    """What the tasks' own questions as tuning text, and the dense model as a teacher, change."""
    said = []
    asked = _asked(one)
    if asked:
        said.append(
            f"the tasks' own training questions as half of the tuning text win back {tasks_share(one, asked[0])} of "
            "the accuracy"
        )
    distilled = [entry for entry in spp_entries(one) if entry.settings["options"].get("teacher")]
    if distilled:
        best = max(distilled, key=lambda entry: one.won_back(entry, UNLIKE))
        said.append(
            f"distilling the dense model wins back {one.won_back(best, UNLIKE):.0%} on {text_name(store, UNLIKE)} and "
            f"{one.won_back(best, MAIN_TEXT):.0%} on {text_name(store, MAIN_TEXT)}"
            + (f", and {share} of the accuracy" if (share := tasks_share(one, best)) else "")
        )
    return [f"At {one.pruning.label}, {'; '.join(said)}."] if said else []


def _rivals(one: Comparison) -> list[Entry]:
    """The others whose zeros are kept too, each at its best rate."""
    return [
        entry
        for entry in _untold(one)
        if entry not in spp_entries(one) and entry.deployed[0]["zeros_lost"] == 0 and not entry.gave_way
    ]


def _standing(spp: Entry, rivals: Sequence[Entry]) -> tuple[list[Entry], list[Entry]]:
    """Those that are more accurate than SPP by over two standard errors, and those that are less."""
    leads = [(_certain(spp, entry), entry) for entry in rivals]
    return [entry for lead, entry in leads if lead < 0], [entry for lead, entry in leads if lead > 0]


def _asked(one: Comparison) -> list[Entry]:
    """SPP, tuned on the tasks' training parts."""
    return [entry for entry in spp_entries(one) if entry.saw_tasks and entry.has_tasks]


def _named(entries: Sequence[Entry]) -> str:
    return "; ".join(entry.label for entry in entries) or "none"


def _untold(one: Comparison) -> list[Entry]:
    """The entries that were asked questions and not tuned on any."""
    return [entry for entry in one.entries if entry.has_tasks and not entry.saw_tasks]


def _probability_sentence(one: Comparison) -> list[str]:
    own = [entry for entry in _untold(one) if entry in spp_entries(one)]
    if not own:
        return []

    def moved(entry: Entry) -> float:
        return entry.probability_gain(one.pruned)[0]

    best = max(own, key=moved)
    rivals = sorted((entry for entry in _untold(one) if entry not in own), key=moved)
    ends = rivals[:1] + rivals[1:][-1:]
    compared = " to ".join(f"{points(*entry.probability_gain(one.pruned))} ({entry.label})" for entry in ends)
    return [
        "The probability of the right choice, which shows smaller changes, moved by "
        f"{points(*one.pruned.probability_gain(one.dense))} points with pruning. From there {best.label}"
        f"{', the best of the SPP variants,' if len(own) > 1 else ''} moved it by "
        f"{points(*best.probability_gain(one.pruned))}{', the others by ' + compared if rivals else ''}."
    ]


def _rivals_sentences(store: Store, one: Comparison, spp: Entry) -> list[str]:
    """Which of the others whose zeros are kept too are ahead of SPP, on which text, and which are behind it."""
    rivals = _rivals(one)
    if not rivals:
        return []

    def lower(entry: Entry, text: str) -> bool:
        return entry.perplexity(text).mean < spp.perplexity(text).mean

    both = [entry for entry in rivals if lower(entry, MAIN_TEXT) and lower(entry, UNLIKE)]
    like = [entry for entry in rivals if lower(entry, MAIN_TEXT) and entry not in both]
    unlike = [entry for entry in rivals if lower(entry, UNLIKE) and entry not in both]
    ahead, behind = _standing(spp, rivals)
    return [
        f"Of the others that keep the zeros, with a lower perplexity than {spp.label} on "
        f"{text_name(store, MAIN_TEXT)} alone, so closer to the tuning text and not to the dense model: "
        f"{_named(like)}. On {text_name(store, UNLIKE)} alone: {_named(unlike)}. On both: {_named(both)}. More "
        f"accurate by over two standard errors: {_named(ahead)}. Less accurate by as much: {_named(behind)}."
    ]


def _why_sentences(one: Comparison, spp: Entry) -> list[str]:
    """What keeps the methods so close together: how many questions there are, and the text."""
    rivals = _rivals(one)
    shares = [one.tasks_won_back(entry) for entry in (spp, *rivals)]
    if not rivals or not all(map(math.isfinite, shares)):
        return []
    lost = one.dense.gain(one.pruned)[0]
    smallest = min(2 * spp.gain(entry)[1] for entry in rivals)
    said = (
        f"Why no more can be said: two standard errors of SPP's lead are at least {100 * smallest:.1f} points, "
        f"{smallest / lost:.0%} of what pruning took."
    )
    asked = [one.tasks_won_back(entry) for entry in _asked(one)]
    if asked and max(asked) > max(shares):
        said += (
            f" The text matters more than the method: on the same text SPP and they win back {min(shares):.0%} to "
            f"{max(shares):.0%} of the accuracy, and SPP {max(asked):.0%} with the tasks' questions in it."
        )
    return [said]


def _undecided_sentence(one: Comparison) -> list[str]:
    """That the tasks tell no method from doing nothing, where that is so."""
    entries = _untold(one)
    if len(entries) < 2 or any(_certain(entry, one.pruned) for entry in entries):
        return []
    return [
        f"None of the methods changes the accuracy by more than two standard errors: of what pruning took, too little "
        f"comes back after so many tokens to tell them apart by {_questions(one):,} questions."
    ]


def _certain(one: Entry, other: Entry) -> float:
    """How much more accurate one is than the other, zero within two standard errors."""
    gain, error = one.gain(other)
    return gain if abs(gain) > 2 * error else 0.0


def copy_sentences(one: Comparison, first: Comparison) -> str:
    """Which copy of the pruned model this is, and how far the same run is apart on it and on the first."""
    again = [(entry, same) for entry in one.entries if (same := _same(first, entry)) and entry.has_tasks]
    repeated = "; ".join(
        f"{entry.label} wins back {shares(first, same)} on the first and {shares(one, entry)} on the other"
        for entry, same in again
    )
    return (
        "Another copy of the pruned model: each machine prunes its own. This one was pruned and tuned on "
        f"{one.pruned.machine}, the first on {first.pruned.machine}. What is won back and SPP's lead are from the "
        f"same copy.{' The same run on both: ' + repeated + '.' if repeated else ''}"
    )


def _same(one: Comparison, entry: Entry) -> Entry | None:
    """The entry of the same contender at the same rate on another copy."""

    def key(some: Entry) -> tuple[object, ...]:
        return (*(some.settings[name] for name in ("method", "options", "equal", "rate")), some.deployment)

    return next((own for own in one.entries if key(own) == key(entry)), None)


def _equal_sentence(store: Store, one: Comparison, spp: Entry) -> list[str]:
    """SPP next to those that got as much time, or have as many parameters."""
    rivals = [entry for entry in one.entries if entry.settings["equal"]]
    if not rivals:
        return []
    told = "; ".join(f"{entry.label} {shares(one, entry)}" for entry in (spp, *rivals))
    return [
        f"With SPP's number of parameters or in its time, won back on {text_name(store, MAIN_TEXT)} / on "
        f"{text_name(store, UNLIKE)} / of the accuracy: {told}."
    ]


def _start_sentence(store: Store, one: Comparison) -> list[str]:
    """The two starts of A, at the same rate."""
    positive = one.find("spp_positive")
    default = _at_rate(one, "spp", positive) if positive is not None else None
    if positive is None or default is None:
        return []
    texts = " and ".join(
        f"{positive.perplexity(text).mean:.2f} against {default.perplexity(text).mean:.2f} on {text_name(store, text)}"
        for text in (MAIN_TEXT, UNLIKE)
    )
    return [
        f"The positive start of A against the default start, at rate {positive.settings['rate']:g}: perplexity "
        f"{texts}, accuracy {points(*positive.gain(default))} points."
    ]


def _at_rate(one: Comparison, method: str, other: Entry) -> Entry | None:
    """The entry of a method at the rate of another."""
    same = [entry for entry in one.entries if entry.settings["method"] == method and not entry.settings["options"]]
    return next((entry for entry in same if entry.settings["rate"] == other.settings["rate"]), None)


def text_name(store: Store, text: str) -> str:
    """A text that perplexity is measured on, for readers."""
    if text == MAIN_TEXT:
        return "WikiText-2" if "wikitext" in store.about["text"] else "text"
    return {"problems": "GSM8K", UNLIKE: "Python docs"}[text]
