# SPDX-License-Identifier: Apache-2.0
"""What the page of a pretrained model says first: its findings, in sentences."""

from __future__ import annotations

import math
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
    said = [*_rivals_sentence(one, spp), *_told_sentence(one), *_probability_sentence(one)]
    return [*said, *_elsewhere_sentence(one)]


def main_entry(one: Comparison) -> Entry | None:
    """SPP as it is compared with the others."""
    return one.find("spp") or one.find("spp_positive")


def spp_entries(one: Comparison) -> list[Entry]:
    """The contenders that are SPP, with whatever settings."""
    return [entry for entry in one.entries if entry.settings["method"].startswith("spp")]


def _pruned_sentence(store: Store, one: Comparison) -> str:
    lost, error = one.pruned.gain(one.dense)
    return (
        f"{one.pruning.label}: pruning takes the perplexity on {_text_names(store, one)} from "
        f"{_perplexities(one.dense)} to {_perplexities(one.pruned)}, and the mean accuracy from "
        f"{one.dense.accuracy:.1%} to {one.pruned.accuracy:.1%} ({points(lost, error)} points)."
    )


def _won_back_sentence(one: Comparison, spp: Entry) -> str:
    untold = [entry for entry in spp_entries(one) if not entry.saw_tasks]
    best_text = max(untold, key=lambda entry: one.won_back(entry, UNLIKE))
    best = max(untold, key=lambda entry: entry.accuracy)
    elsewhere = "" if best_text is spp else f" ({one.won_back(best_text, UNLIKE):.0%} by {best_text.label})"
    tasks = _tasks(one, spp)
    if best is not spp:
        tasks += f"; the most accurate of SPP's {len(untold)} variants, {best.label}, {_tasks(one, best)}"
    return (
        f"{spp.label}, after {spp.tuned['tokens']:,} tokens, wins back {one.won_back(spp, MAIN_TEXT):.0%} of the "
        f"log-perplexity on text like the tuning text, {one.won_back(spp, UNLIKE):.0%} on other text{elsewhere}, and "
        f"of the accuracy {tasks}."
    )


def _tasks(one: Comparison, entry: Entry) -> str:
    """How much of the accuracy an entry wins back."""
    gain, error = entry.gain(one.pruned)
    doubt = "" if abs(gain) > 2 * error else ", not distinguishable from zero"
    share = one.tasks_won_back(entry)
    return f"{share:.0%} ({points(gain, error)} points{doubt})" if math.isfinite(share) else points(gain, error)


def _probability_sentence(one: Comparison) -> list[str]:
    untold = [entry for entry in one.entries if entry.has_tasks and not entry.saw_tasks]
    own = [entry for entry in untold if entry in spp_entries(one)]
    if not own:
        return []
    best = max(own, key=lambda entry: entry.probability_gain(one.pruned)[0])
    rivals = [entry for entry in untold if entry not in own]
    compared = "".join(f"; {entry.label} by {points(*entry.probability_gain(one.pruned))}" for entry in rivals)
    return [
        "The probability of the right choice, which shows smaller changes, moved by "
        f"{points(*one.pruned.probability_gain(one.dense))} points with pruning. From there {best.label}"
        f"{', the best of the SPP variants,' if len(own) > 1 else ''} moved it by "
        f"{points(*best.probability_gain(one.pruned))}{compared}."
    ]


def _rivals_sentence(one: Comparison, spp: Entry) -> list[str]:
    """SPP and each of the others whose zeros are kept too."""
    rivals = [
        entry
        for entry in one.entries
        if entry.has_tasks
        and entry not in spp_entries(one)
        and not entry.saw_tasks
        and entry.deployed[0]["zeros_lost"] == 0
    ]
    if not rivals:
        return []
    own = spp.perplexity(MAIN_TEXT).mean
    lower = [entry.label for entry in rivals if own < entry.perplexity(MAIN_TEXT).mean]
    higher = [entry.label for entry in rivals if own >= entry.perplexity(MAIN_TEXT).mean]
    order = [f"lower with {spp.label} than with {'; '.join(lower)}"] if lower else []
    order += [f"{'not' if lower else f'not lower with {spp.label} than'} with {'; '.join(higher)}"] if higher else []
    gains = {entry.label: spp.gain(entry) for entry in rivals}
    large = [label for label, (gain, error) in gains.items() if abs(gain) > 2 * error]
    verdict = f"More than two standard errors: {'; '.join(large)}." if large else "None exceeds two standard errors."
    return [
        "Among the methods that keep the zeros, the perplexity on text like the tuning text is "
        f"{', '.join(order)}. The accuracy of {spp.label} minus theirs, on the same questions: "
        f"{'; '.join(f'{label}: {points(*gain)}' for label, gain in gains.items())}. {verdict}"
    ]


def _told_sentence(one: Comparison) -> list[str]:
    """What tuning on the training parts of the tasks does."""
    told = [f"{entry.label} {_tasks(one, entry)}" for entry in one.entries if entry.saw_tasks and entry.has_tasks]
    if not told:
        return []
    return [
        f"With the tasks' training parts in the tuning text, won back of the accuracy: {'; '.join(told)}. The dense "
        "model was not tuned on them."
    ]


def _elsewhere_sentence(one: Comparison) -> list[str]:
    """Which entries are of another machine's copy of the pruned model, and how far the copies are apart."""
    others = [entry for entry in one.entries if one.is_elsewhere(entry)]
    if not others:
        return []
    names = ", ".join(dict.fromkeys(entry.machine for entry in others))
    starts = [entry.tuned["first_loss"] for entry in one.entries if "text" not in entry.settings["options"]]
    return [
        f"† Tuned on another machine ({names}) than the pruned model of the second row ({one.pruned.machine}). Each "
        "pruned its own copy. Their losses on the first batch, before tuning, are "
        f"{min(starts):.3f} to {max(starts):.3f}, so that a difference of a few percent in perplexity means nothing."
    ]


def _start_sentence(comparisons: Sequence[Comparison]) -> list[str]:
    pairs = [(one, one.find("spp_positive"), one.find("spp")) for one in comparisons]
    said = [
        f"{one.pruning.label}, perplexity {positive.perplexity(MAIN_TEXT).mean:.2f} against "
        f"{default.perplexity(MAIN_TEXT).mean:.2f} and, on other text, "
        f"{positive.perplexity(UNLIKE).mean:.2f} against {default.perplexity(UNLIKE).mean:.2f}, accuracy "
        f"{points(*positive.gain(default))} points"
        for one, positive, default in pairs
        if positive is not None and default is not None and positive.machine == default.machine
    ]
    return [f"The positive start of A against the default start: {'; '.join(said)}."] if said else []


def _zeros_sentence(store: Store, comparisons: Sequence[Comparison]) -> str:
    models = [deployed for one in comparisons for entry in spp_entries(one) for deployed in entry.deployed]
    lost = sum(one["zeros_lost"] or 0 for one in models)
    lora = next((entry for one in comparisons if (entry := one.find("lora"))), None)
    merged = "" if lora is None else f"; LoRA, merged, lost {lora.deployed[0]['zeros_lost'] or 0:,}"
    return f"Zeros lost by SPP, in all of its tuned models together ({len(models)}): {lost:,}{merged}."


def _text_names(store: Store, one: Comparison) -> str:
    return ", ".join(text_name(store, text) for text in one.dense.deployed[0]["losses"])


def text_name(store: Store, text: str) -> str:
    """A text that perplexity is measured on, for readers."""
    if text == MAIN_TEXT:
        return "WikiText-2" if "wikitext" in store.about["text"] else "text"
    return {"problems": "GSM8K", UNLIKE: "Python docs"}[text]


def _perplexities(entry: Entry) -> str:
    return ", ".join(f"{entry.perplexity(text).mean:.1f}" for text in entry.deployed[0]["losses"])
