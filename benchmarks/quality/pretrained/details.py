# SPDX-License-Identifier: Apache-2.0
"""What the page says below each table: how SPP compares with the others on one pruned model."""

from __future__ import annotations

import math

from ..data import UNLIKE
from ..store import Store
from .comparison import MAIN_TEXT, Comparison, Entry
from .phrases import named, points, shares, text_name


def details(store: Store, one: Comparison) -> list[str]:
    """How SPP compares with the others on one pruned model."""
    spp = one.spp
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


def _undecided_sentence(one: Comparison) -> list[str]:
    """That the tasks tell no method from doing nothing, where that is so."""
    entries = one.not_tuned_on_tasks
    if len(entries) < 2 or any(entry.certain_gain(one.pruned) for entry in entries):
        return []
    return [
        f"None of the methods changes the accuracy by more than two standard errors: of what pruning took, too little "
        f"comes back after so many tokens to tell them apart by {one.questions:,} questions."
    ]


def _rivals_sentences(store: Store, one: Comparison, spp: Entry) -> list[str]:
    """Which of the others whose zeros are kept too are ahead of SPP, on which text, and which are behind it."""
    rivals = one.rivals
    if not rivals:
        return []

    def lower(entry: Entry, text: str) -> bool:
        return entry.perplexity(text).mean < spp.perplexity(text).mean

    both = [entry for entry in rivals if lower(entry, MAIN_TEXT) and lower(entry, UNLIKE)]
    like = [entry for entry in rivals if lower(entry, MAIN_TEXT) and entry not in both]
    unlike = [entry for entry in rivals if lower(entry, UNLIKE) and entry not in both]
    ahead, behind = one.standing(spp)
    return [
        f"Of the others that keep the zeros, with a lower perplexity than {spp.label} on "
        f"{text_name(store, MAIN_TEXT)} alone, so closer to the tuning text and not to the dense model: "
        f"{named(like)}. On {text_name(store, UNLIKE)} alone: {named(unlike)}. On both: {named(both)}. More "
        f"accurate by over two standard errors: {named(ahead)}. Less accurate by as much: {named(behind)}."
    ]


def _why_sentences(one: Comparison, spp: Entry) -> list[str]:
    """What keeps the methods so close together: how many questions there are, and the text."""
    rivals = one.rivals
    shares = [one.tasks_won_back(entry) for entry in (spp, *rivals)]
    if not rivals or not all(map(math.isfinite, shares)):
        return []
    lost = one.dense.gain(one.pruned)[0]
    smallest = min(2 * spp.gain(entry)[1] for entry in rivals)
    said = (
        f"Why no more can be said: two standard errors of SPP's lead are at least {100 * smallest:.1f} points, "
        f"{smallest / lost:.0%} of what pruning took."
    )
    asked = [one.tasks_won_back(entry) for entry in one.tuned_on_tasks]
    if asked and max(asked) > max(shares):
        said += (
            f" The text matters more than the method: on the same text SPP and they win back {min(shares):.0%} to "
            f"{max(shares):.0%} of the accuracy, and SPP {max(asked):.0%} with the tasks' questions in it."
        )
    return [said]


def _probability_sentence(one: Comparison) -> list[str]:
    own = [entry for entry in one.not_tuned_on_tasks if entry in one.spp_entries]
    if not own:
        return []

    def moved(entry: Entry) -> float:
        return entry.probability_gain(one.pruned)[0]

    best = max(own, key=moved)
    rivals = sorted((entry for entry in one.not_tuned_on_tasks if entry not in own), key=moved)
    ends = rivals[:1] + rivals[1:][-1:]
    compared = " to ".join(f"{points(*entry.probability_gain(one.pruned))} ({entry.label})" for entry in ends)
    return [
        "The probability of the right choice, which shows smaller changes, moved by "
        f"{points(*one.pruned.probability_gain(one.dense))} points with pruning. From there {best.label}"
        f"{', the best of the SPP variants,' if len(own) > 1 else ''} moved it by "
        f"{points(*best.probability_gain(one.pruned))}{', the others by ' + compared if rivals else ''}."
    ]


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
