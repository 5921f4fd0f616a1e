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
    """What a user should know: of each pruning what it took and what came back, and what the start of A changes."""
    said = []
    for one in comparisons:
        if one.copy:
            continue
        spp = main_entry(one)
        sentences = [_pruned_sentence(one)]
        if spp is not None:
            others = [other for other in comparisons if other.pruning == one.pruning and other.copy]
            sentences += [_accuracy_sentence(one, spp, others), _text_sentence(store, one, spp), *_told_sentence(one)]
        said.append(" ".join(sentences))
    return [
        *said,
        *_equal_sentences(store, comparisons),
        *_start_sentence(store, comparisons),
        *_zeros_sentence(comparisons),
    ]


def details(store: Store, one: Comparison) -> list[str]:
    """How SPP compares with the others on one pruned model."""
    spp = main_entry(one)
    if spp is None:
        return []
    return [*_undecided_sentence(one), *_rivals_sentences(store, one, spp), *_probability_sentence(one)]


def main_entry(one: Comparison) -> Entry | None:
    """SPP as it is compared with the others."""
    return one.find("spp") or one.find("spp_positive")


def spp_entries(one: Comparison) -> list[Entry]:
    """The contenders that are SPP, with whatever settings."""
    return [entry for entry in one.entries if entry.settings["method"].startswith("spp")]


def _pruned_sentence(one: Comparison) -> str:
    lost, error = one.pruned.gain(one.dense)
    return (
        f"{one.pruning.label}: the mean accuracy falls from {one.dense.accuracy:.1%} to {one.pruned.accuracy:.1%} "
        f"({points(lost, error)} points)."
    )


def _accuracy_sentence(one: Comparison, spp: Entry, others: Sequence[Comparison]) -> str:
    """How much of the accuracy SPP wins back, also on other copies, and LoRA, which it stands in for."""
    again = [
        f"{_tasks(other, same)} on another copy{other.mark}"
        for other in others
        if (same := _same(other, spp)) is not None
    ]
    said = f"{spp.label}, after {spp.tuned['tokens']:,} tokens, wins back {', '.join([_tasks(one, spp), *again])}"
    said += f", with {_zeros(spp)}"
    merged, masked = one.find("lora"), one.find("lora", "remasked")
    if merged is not None:
        said += f"; {merged.label} {one.tasks_won_back(merged):.0%}, with {_zeros(merged)}"
    if masked is not None:
        said += f"; {masked.label} {one.tasks_won_back(masked):.0%}"
    return f"{said}."


def _zeros(entry: Entry) -> str:
    lost = max(one["zeros_lost"] or 0 for one in entry.deployed)
    return f"{lost:,} zeros lost" if lost else "no zero lost"


def _text_sentence(store: Store, one: Comparison, spp: Entry) -> str:
    best = max(spp_entries(one), key=lambda entry: one.won_back(entry, UNLIKE))
    other = "" if best is spp else f" ({one.won_back(best, UNLIKE):.0%} by {best.label})"
    return (
        f"Of the log-perplexity SPP wins back {one.won_back(spp, MAIN_TEXT):.0%} on {text_name(store, MAIN_TEXT)}, "
        f"which is like the tuning text, and {one.won_back(spp, UNLIKE):.0%} on {text_name(store, UNLIKE)}, which are "
        f"not{other}."
    )


def _tasks(one: Comparison, entry: Entry) -> str:
    """How much of the accuracy an entry wins back."""
    gain, error = entry.gain(one.pruned)
    doubt = "" if abs(gain) > 2 * error else ", not distinguishable from zero"
    share = one.tasks_won_back(entry)
    return f"{share:.0%} ({points(gain, error)} points{doubt})" if math.isfinite(share) else points(gain, error)


def _told_sentence(one: Comparison) -> list[str]:
    """What tuning on the training parts of the tasks does."""
    told = [entry for entry in one.entries if entry.saw_tasks and entry.has_tasks]
    if not told:
        return []
    shares = ", ".join(f"{one.tasks_won_back(entry):.0%} ({entry.label.partition(' (')[0]})" for entry in told)
    return [f"With the tasks' own training questions in the tuning text, of the accuracy comes back: {shares}."]


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
    """Which of the others whose zeros are kept too are ahead of SPP, and which are behind it."""
    rivals = [
        entry for entry in _untold(one) if entry not in spp_entries(one) and entry.deployed[0]["zeros_lost"] == 0
    ]
    if not rivals:
        return []

    def named(entries: Sequence[Entry]) -> str:
        return "; ".join(entry.label for entry in entries) or "none"

    lower = {
        text: [entry for entry in rivals if entry.perplexity(text).mean < spp.perplexity(text).mean]
        for text in (MAIN_TEXT, UNLIKE)
    }
    ahead, behind = ([entry for entry in rivals if sign * _certain(spp, entry) > 0] for sign in (-1, 1))
    return [
        f"Of the others that keep the zeros, with a lower perplexity than {spp.label} on "
        f"{text_name(store, MAIN_TEXT)}: {named(lower[MAIN_TEXT])}. On {text_name(store, UNLIKE)}: "
        f"{named(lower[UNLIKE])}. More accurate by over two standard errors: {named(ahead)}. Less accurate by as "
        f"much: {named(behind)}."
    ]


def _undecided_sentence(one: Comparison) -> list[str]:
    """That the tasks tell no method from doing nothing, where that is so."""
    entries = _untold(one)
    if len(entries) < 2 or any(_certain(entry, one.pruned) for entry in entries):
        return []
    questions = sum(len(scores[f"{METRIC} right"]) for scores in one.pruned.deployed[0]["tasks"].values())
    return [
        f"None of the methods changes the accuracy by more than two standard errors: of what pruning took, too little "
        f"comes back after so many tokens to tell them apart by {questions:,} questions."
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


def _equal_sentences(store: Store, comparisons: Sequence[Comparison]) -> list[str]:
    """SPP next to those that got as much time, or have as many parameters."""
    said = []
    for one in comparisons:
        spp, rivals = main_entry(one), [entry for entry in one.entries if entry.settings["equal"]]
        if spp is not None and rivals:
            told = "; ".join(f"{entry.label} {shares(one, entry)}" for entry in (spp, *rivals))
            said.append(
                f"{one.label}, with SPP's number of parameters or in its time, won back on "
                f"{text_name(store, MAIN_TEXT)} / on {text_name(store, UNLIKE)} / of the accuracy: {told}."
            )
    return said


def _start_sentence(store: Store, comparisons: Sequence[Comparison]) -> list[str]:
    pairs = [
        (one, positive, _at_rate(one, "spp", positive))
        for one in comparisons
        if (positive := one.find("spp_positive"))
    ]
    said = [
        f"{one.label}, perplexity {positive.perplexity(MAIN_TEXT).mean:.2f} against "
        f"{default.perplexity(MAIN_TEXT).mean:.2f} on {text_name(store, MAIN_TEXT)} and "
        f"{positive.perplexity(UNLIKE).mean:.2f} against {default.perplexity(UNLIKE).mean:.2f} on "
        f"{text_name(store, UNLIKE)}, accuracy "
        f"{points(*positive.gain(default))} points"
        for one, positive, default in pairs
        if default is not None
    ]
    return [f"The positive start of A against the default start: {'; '.join(said)}."] if said else []


def _at_rate(one: Comparison, method: str, other: Entry) -> Entry | None:
    """The entry of a method at the rate of another."""
    same = [entry for entry in one.entries if entry.settings["method"] == method and not entry.settings["options"]]
    return next((entry for entry in same if entry.settings["rate"] == other.settings["rate"]), None)


def _zeros_sentence(comparisons: Sequence[Comparison]) -> list[str]:
    models = [deployed for one in comparisons for entry in spp_entries(one) for deployed in entry.deployed]
    lost = sum(one["zeros_lost"] or 0 for one in models)
    return [f"Zeros lost by SPP, in all of its tuned models together ({len(models)}): {lost:,}."] if models else []


def text_name(store: Store, text: str) -> str:
    """A text that perplexity is measured on, for readers."""
    if text == MAIN_TEXT:
        return "WikiText-2" if "wikitext" in store.about["text"] else "text"
    return {"problems": "GSM8K", UNLIKE: "Python docs"}[text]
