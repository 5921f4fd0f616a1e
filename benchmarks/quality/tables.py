# SPDX-License-Identifier: Apache-2.0
"""The tables of the page, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from .analysis import Analysis, Outcome, Spread, label_of
from .design import Pruning
from .suites import PRUNERS, REQUESTS


def main_table(analysis: Analysis, model: str, pruning: Pruning) -> str:
    """All contenders on a pruned model; what does not fit is in the JSON."""
    headings = ["", "learning rate", "trained parameters", "perplexity", "won back", "zeros lost", "step ÷ SPP's"]
    rows = [["none", "–", "–", f"{math.exp(analysis.losses[model, pruning.name]):.2f}", "0%", "–", "–"]]
    for one in sorted(analysis.of(model, pruning), key=lambda one: not one.method.startswith("spp")):
        ratio = analysis.step_ratio(one.model, one.name)
        rows.append(
            [
                f"**{one.label}**" if one.method.startswith("spp") else one.label,
                f"{one.rate:g}",
                f"{one.measured('trainable'):,}",
                perplexity(one),
                percent(one.recovery),
                "not merged"
                if one.deployment == "unmerged"
                else f"{max(x or 0 for x in one.deployed('zeros_lost')):,}",
                "–" if ratio is None else f"{ratio:.2f}",
            ]
        )
    return table(headings, rows, numbers_from=1)


def prunings_table(analysis: Analysis, model: str) -> str:
    """Perplexities for every pruning of a model: before fine-tuning, and of the methods that were run on all."""
    shown = (("spp", "merged"), ("lora", "remasked"), ("masked_full", "merged"))
    rows = []
    for pruner in PRUNERS:
        for request in REQUESTS:
            pruning = Pruning(pruner, request)
            outcomes = [analysis.find(model, pruning, *one) for one in shown]
            if (model, pruning.name) not in analysis.losses or None in outcomes:
                continue
            cells = [f"{one.perplexity.mean:.2f} ({one.recovery.mean:.0%})" for one in outcomes if one is not None]
            rows.append([pruning.label, f"{math.exp(analysis.losses[model, pruning.name]):.2f}", *cells])
    return table(["", "pruned", "SPP", "LoRA, merged and masked again", "masked full fine-tuning"], rows)


def rates_table(analysis: Analysis, model: str, prunings: Sequence[Pruning]) -> str:
    """The learning rates that were tried, and their validation perplexities."""
    rows = []
    for pruning in prunings:
        for one in analysis.of(model, pruning):
            if one.equal == "time" or one.deployment in ("unmerged", "remasked"):
                continue
            tried = {
                record.settings["rate"]: record.measured["validation_loss"]
                for record in analysis.store.records
                if record.kind == "tune"
                and record.settings["base"] == one.runs[0].settings["base"]
                and record.settings["pruning"] == pruning.name
                and record.settings["method"] == one.method
                and record.settings["options"] == one.options
                and record.settings["equal"] == one.equal
                and record.settings["seed"] == one.runs[0].settings["seed"]
            }
            cells = [_rate_cell(rate, loss, one.rate) for rate, loss in sorted(tried.items())]
            label = label_of(one.runs[0].settings, None)
            rows.append([pruning.label, label, ", ".join(cells) + (" (edge)" if one.at_edge else "")])
    return table(["", "", "learning rate: validation perplexity"], rows, numbers_from=3)


def variations_table(analysis: Analysis, model: str, pruning: Pruning) -> str:
    """Variations of one method, each at its best learning rate."""
    rows = []
    for one in analysis.of(model, pruning):
        largest = max(
            record.measured["max_loss"] or math.inf
            for record in analysis.store.records
            if record.kind == "tune"
            and record.settings["base"] == one.runs[0].settings["base"]
            and record.settings["options"] == one.options
            and record.settings["equal"] is None
            and record.settings["pruning"] == pruning.name
        )
        rows.append(
            [
                ", ".join(f"{name} = {value}" for name, value in one.options.items()) or "defaults",
                ", ".join(f"{rate:g}" for rate in one.rates),
                f"{one.rate:g}" + (" (edge)" if one.at_edge else ""),
                f"{one.measured('trainable'):,}",
                perplexity(one),
                percent(one.recovery),
                f"{largest:.2f}",
            ]
        )
    headings = [
        "",
        "rates tried",
        "best rate",
        "trained parameters",
        "perplexity",
        "won back",
        "largest loss of any run",
    ]
    return table(headings, rows)


def _rate_cell(rate: float, loss: float | None, chosen: float) -> str:
    text = f"{rate:g}: {'diverged' if loss is None else f'{math.exp(loss):.2f}'}"
    return f"**{text}**" if rate == chosen else text


def perplexity(outcome: Outcome) -> str:
    """The mean, and the deviation where there are several seeds."""
    spread = outcome.perplexity
    return f"{spread.mean:.2f}" + (f" ± {spread.deviation:.2f}" if spread.count > 1 else "")


def percent(spread: Spread) -> str:
    """A share as a percentage, with the deviation where there are several seeds."""
    return f"{spread.mean:.0%}" + (f" ± {spread.deviation * 100:.0f}" if spread.count > 1 else "")


def format_kilobytes(count: float | None) -> str:
    """A number of bytes in kB or MB."""
    if count is None:
        return "–"
    return f"{count / 1e3:,.0f} kB" if count < 1e6 else f"{count / 1e6:,.1f} MB"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int = 2) -> str:
    """A Markdown table."""
    rule = ["---" if column < numbers_from else "---:" for column in range(len(headings))]
    return "\n".join("| " + " | ".join(row) + " |" for row in ([*headings], rule, *rows))
