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
    """What the first pruning says, in a few sentences, as far as it is measured."""
    one = comparisons[0]
    spp = one.find("spp_positive") or one.find("spp")
    said = [_pruned_sentence(store, one)]
    if spp is None:
        return said
    best = max(spp_entries(one), key=lambda entry: entry.accuracy)
    said += [_perplexity_sentence(one, spp), _tasks_sentence(one, spp, best), _probability_sentence(one)]
    return [*said, *_start_sentence(comparisons), _zeros_sentence(store, comparisons)]


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


def _perplexity_sentence(one: Comparison, spp: Entry) -> str:
    others = [one.find("masked_full"), one.find("lora", "remasked"), one.find("ia3")]
    others += [entry for entry in one.entries if entry.settings["equal"] == "parameters"]
    compared = "; ".join(
        f"{entry.label} {entry.perplexity(MAIN_TEXT).mean:.1f} ({one.won_back(entry, MAIN_TEXT):.0%})"
        for entry in others
        if entry is not None
    )
    best = max(spp_entries(one), key=lambda entry: one.won_back(entry, UNLIKE))
    recipe = f", where {best.label} wins back {one.won_back(best, UNLIKE):.0%}" if best is not spp else ""
    return (
        f"After {spp.tuned['tokens']:,} tokens {spp.label} has a perplexity of {spp.perplexity(MAIN_TEXT).mean:.1f} "
        f"on text like the tuning text. It wins back {one.won_back(spp, MAIN_TEXT):.0%} of the log-perplexity there, "
        f"and {one.won_back(spp, UNLIKE):.0%} on other text{recipe}."
        + (f" On text like the tuning text: {compared}." if compared else "")
    )


def _tasks_sentence(one: Comparison, spp: Entry, best: Entry) -> str:
    own, own_error = best.gain(one.pruned)
    recipe = "" if best is spp else f"; the best of SPP's recipes, {best.label}: {points(own, own_error)}"
    share = one.tasks_won_back(best)
    verdict = f"the best recipe recovers {share:.0%} of the accuracy lost by pruning"
    if abs(own) < 2 * own_error:
        verdict += ", a difference of less than two standard errors: not distinguishable from zero"
    elif share < 0.5:
        verdict += ", less than half"
    return (
        "Perplexity on the tuning text shows adaptation, the tasks show recovery: compared with the pruned model, the "
        f"mean accuracy of {spp.label} changes by {points(*spp.gain(one.pruned))} points{recipe}; {verdict}."
    )


def _probability_sentence(one: Comparison) -> str:
    best = max(spp_entries(one), key=lambda entry: entry.probability_gain(one.pruned)[0])
    rivals = [entry for entry in one.entries if entry.has_tasks and entry not in spp_entries(one)]
    compared = "".join(f", {entry.label} by {points(*entry.probability_gain(one.pruned))}" for entry in rivals)
    return (
        "The probability of the right choice, which shows smaller changes, moved by "
        f"{points(*one.pruned.probability_gain(one.dense))} points with pruning. From there {best.label}, the best of "
        f"SPP's recipes, moved it by {points(*best.probability_gain(one.pruned))}{compared}."
    )


def _start_sentence(comparisons: Sequence[Comparison]) -> list[str]:
    pairs = [(one, one.find("spp_positive"), one.find("spp")) for one in comparisons]
    said = [
        f"{one.pruning.label}, perplexity {positive.perplexity(MAIN_TEXT).mean:.2f} against "
        f"{default.perplexity(MAIN_TEXT).mean:.2f} and, on other text, "
        f"{positive.perplexity(UNLIKE).mean:.2f} against {default.perplexity(UNLIKE).mean:.2f}"
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
