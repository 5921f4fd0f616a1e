# SPDX-License-Identifier: Apache-2.0
"""What the page of a pretrained model says first: its findings, in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from .data import UNLIKE
from .pretrained_results import Comparison, Entry
from .store import Store


MAIN_TEXT = "text"


def points(gain: float, error: float) -> str:
    """A difference in percentage points, with its standard error."""
    return f"{100 * gain:+.1f} ± {100 * error:.1f}"


def findings(store: Store, comparisons: Sequence[Comparison]) -> list[str]:
    """What a user should know: of each pruning one sentence of what it took and one of what SPP brought back."""
    said = []
    for one in comparisons:
        spp = main_entry(one)
        said.append(_pruned_sentence(store, one) + ("" if spp is None else f" {_won_back_sentence(one, spp)}"))
    tuned = [one for one in comparisons if main_entry(one) is not None]
    return [*said, *_start_sentence(comparisons), _zeros_sentence(store, comparisons)] if tuned else said


def details(one: Comparison) -> list[str]:
    """How SPP compares with the others on one pruned model."""
    spp = main_entry(one)
    if spp is None:
        return []
    return [*_rivals_sentence(one, spp), *_told_sentence(one), _probability_sentence(one)]


def main_entry(one: Comparison) -> Entry | None:
    """SPP as it is compared with the others."""
    return one.find("spp") or one.find("spp_positive")


def spp_entries(one: Comparison) -> list[Entry]:
    """The contenders that are SPP, with whatever settings."""
    return [entry for entry in one.entries if entry.settings["method"].startswith("spp")]


def _pruned_sentence(store: Store, one: Comparison) -> str:
    lost, error = one.pruned.gain(one.dense)
    return (
        f"{one.pruning.label}: pruning takes the perplexity on {_text_names(store)} from {_perplexities(one.dense)} "
        f"to {_perplexities(one.pruned)}, and the mean accuracy from {one.dense.accuracy:.1%} to "
        f"{one.pruned.accuracy:.1%} ({points(lost, error)} points)."
    )


def _won_back_sentence(one: Comparison, spp: Entry) -> str:
    untold = [entry for entry in spp_entries(one) if not entry.saw_tasks]
    best_text = max(untold, key=lambda entry: one.won_back(entry, UNLIKE))
    best = max(untold, key=lambda entry: entry.accuracy)
    elsewhere = "" if best_text is spp else f" ({one.won_back(best_text, UNLIKE):.0%} by {best_text.label})"
    tasks = f"{one.tasks_won_back(spp):.0%} of the accuracy ({points(*spp.gain(one.pruned))} points)"
    if best is not spp:
        tasks += (
            f"; the most accurate of SPP's {len(untold)} variants, {best.label}, {one.tasks_won_back(best):.0%} "
            f"({points(*best.gain(one.pruned))})"
        )
    return (
        f"{spp.label}, after {spp.tuned['tokens']:,} tokens, wins back {one.won_back(spp, MAIN_TEXT):.0%} of the "
        f"log-perplexity on text like the tuning text, {one.won_back(spp, UNLIKE):.0%} on other text{elsewhere}, and "
        f"{tasks}."
    )


def _probability_sentence(one: Comparison) -> str:
    untold = [entry for entry in one.entries if entry.has_tasks and not entry.saw_tasks]
    own = [entry for entry in untold if entry in spp_entries(one)]
    best = max(own, key=lambda entry: entry.probability_gain(one.pruned)[0])
    rivals = [entry for entry in untold if entry not in own]
    compared = "".join(f"; {entry.label} by {points(*entry.probability_gain(one.pruned))}" for entry in rivals)
    return (
        "The probability of the right choice, which shows smaller changes, moved by "
        f"{points(*one.pruned.probability_gain(one.dense))} points with pruning. From there {best.label}, the best of "
        f"SPP's recipes, moved it by {points(*best.probability_gain(one.pruned))}{compared}."
    )


def _rivals_sentence(one: Comparison, spp: Entry) -> list[str]:
    """SPP and each of the others whose zeros are kept too."""
    rivals = [
        entry
        for entry in one.entries
        if entry.has_tasks
        and entry not in spp_entries(one)
        and not entry.saw_tasks
        and not entry.deployed[0]["zeros_lost"]
    ]
    if not rivals:
        return []
    own = spp.perplexity(MAIN_TEXT).mean
    ahead, behind = (
        [entry.label for entry in rivals if (entry.perplexity(MAIN_TEXT).mean > own) == better]
        for better in (True, False)
    )
    order = [f"lower than that of {'; '.join(ahead)}"] * bool(ahead) + [
        f"higher than that of {'; '.join(behind)}"
    ] * bool(behind)
    gains = {entry.label: spp.gain(entry) for entry in rivals}
    apart = [label for label, (gain, error) in gains.items() if abs(gain) > 2 * error]
    verdict = "None of the differences exceeds"
    if apart:
        several = len(apart) > 1
        names = " and to ".join(apart)
        verdict = f"Only the difference{'s' * several} to {names} exceed{'s' * (not several)}"
    return [
        f"Among the methods that keep the zeros, {spp.label} has a perplexity on text like the tuning text that is "
        f"{' and '.join(order)}. Its accuracy minus theirs, on the same questions: "
        f"{'; '.join(f'{label}: {points(*gain)}' for label, gain in gains.items())}. {verdict} two standard errors."
    ]


def _told_sentence(one: Comparison) -> list[str]:
    """What tuning on the training parts of the tasks does."""
    told = [
        f"{entry.label} wins back {one.tasks_won_back(entry):.0%} of the accuracy ({points(*entry.gain(one.pruned))})"
        for entry in one.entries
        if entry.saw_tasks and entry.has_tasks
    ]
    return [f"With questions like those of the tasks in the tuning text: {', '.join(told)}."] if told else []


def _start_sentence(comparisons: Sequence[Comparison]) -> list[str]:
    pairs = [(one, one.find("spp_positive"), one.find("spp")) for one in comparisons]
    said = [
        f"{one.pruning.label}, perplexity {positive.perplexity(MAIN_TEXT).mean:.2f} against "
        f"{default.perplexity(MAIN_TEXT).mean:.2f} and, on other text, "
        f"{positive.perplexity(UNLIKE).mean:.2f} against {default.perplexity(UNLIKE).mean:.2f}, accuracy "
        f"{points(*positive.gain(default))} points"
        for one, positive, default in pairs
        if positive is not None and default is not None
    ]
    return [f"The positive start of A against the default start: {'; '.join(said)}."] if said else []


def _zeros_sentence(store: Store, comparisons: Sequence[Comparison]) -> str:
    models = [deployed for one in comparisons for entry in spp_entries(one) for deployed in entry.deployed]
    lost = sum(one["zeros_lost"] for one in models)
    lora = next((entry for one in comparisons if (entry := one.find("lora"))), None)
    merged = "" if lora is None else f"; LoRA, merged, lost {lora.deployed[0]['zeros_lost']:,}"
    return f"Zeros lost by SPP, in all of its tuned models together ({len(models)}): {lost:,}{merged}."


def _text_names(store: Store) -> str:
    return ", ".join(text_name(store, text) for text in store.records[0].measured["losses"])


def text_name(store: Store, text: str) -> str:
    """A text that perplexity is measured on, for readers."""
    if text == MAIN_TEXT:
        return "WikiText-2" if "wikitext" in store.about["text"] else "text"
    return {"problems": "GSM8K", UNLIKE: "Python docs"}[text]


def _perplexities(entry: Entry) -> str:
    return ", ".join(f"{entry.perplexity(text).mean:.1f}" for text in entry.deployed[0]["losses"])
