# SPDX-License-Identifier: Apache-2.0
"""The page of the suite of a pretrained model. Nothing on it is written by hand."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_spp.durable import write_text

from ...harness import format_bytes, format_ratio
from ...harness.statistics import ratio_summary
from ..analysis import label_of
from ..data import UNLIKE
from ..design import Pruning
from ..methods import METHODS
from ..page import bullets, paragraph
from ..store import UNSTABLE, Store
from ..tables import format_kilobytes, table
from . import prose
from .comparison import Comparison, Entry
from .details import copy_sentences, details
from .findings import findings, findings_table
from .phrases import points, tasks_share, text_name
from .picture import draw
from .results import comparisons_of, machines, model_name


SMOLLM = "SmolLM2-135M-Instruct"


def write_pretrained(store: Store, page: Path) -> list[Path]:
    """
    Write the page and its picture.

    Args:
        store (`Store`): The measurements of the suite; the picture goes next to their file.
        page (`Path`): The page.

    Returns:
        `list[Path]`: The files written.
    """
    comparisons = comparisons_of(store)
    picture = store.path.with_suffix(".png")
    draw(comparisons, store, picture)
    parts = [
        "# Quality on a pretrained model",
        paragraph(opening(store)),
        findings_table(store, comparisons),
        bullets(findings(store, comparisons)),
        f"![Perplexity and accuracy, by pruning]({Path(os.path.relpath(picture, page.parent)).as_posix()})",
        paragraph(legend(store, comparisons[0])),
    ]
    for one, *others in by_pruning(comparisons):
        parts += [f"## {one.label}", quality_table(store, one), bullets(details(store, one))]
        for other in others:
            parts += [f"### {other.label}", paragraph(copy_sentences(other, one))]
            parts += [quality_table(store, other), bullets(details(store, other))]
    read = prose.READING.format(**reading(store, comparisons))
    parts.append(paragraph(f"{read.strip()} {published(store).strip()}"))
    tuned = [one for one in comparisons if one.entries]
    if tuned:
        budget = store.about["suite"]["budget"]
        parts += [
            "## Costs",
            costs_table(store, tuned),
            paragraph(prose.COSTS.format(**budget)),
            "## Learning rates",
        ]
        parts += [paragraph(prose.RATES.format(**budget)), rates_table(tuned)]
        if unstable := unstable_runs(store):
            parts.append(paragraph(unstable))
    parts += ["## How it was measured", paragraph(method(store)), missing(store, comparisons)]
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, "\n\n".join(part for part in parts if part) + "\n")
    return [page, picture]


def by_pruning(comparisons: Sequence[Comparison]) -> list[list[Comparison]]:
    """The comparisons of each pruning, which are those of the copies of one pruned model."""
    groups: dict[Pruning, list[Comparison]] = {}
    for one in comparisons:
        groups.setdefault(one.pruning, []).append(one)
    return list(groups.values())


def opening(store: Store) -> str:
    """What the page is about."""
    origin = prose.ORIGIN.strip() if model_name(store) == SMOLLM else ""
    return prose.OPENING.format(model=model_name(store), origin=f" {origin}".rstrip())


def legend(store: Store, one: Comparison) -> str:
    """How to read the tables."""
    like = [text_name(store, text) for text in one.dense.deployed[0]["losses"] if text != UNLIKE]
    return prose.LEGEND.format(like=f"{' and '.join(like)} {'is' if len(like) == 1 else 'are'}")


def quality_table(store: Store, one: Comparison) -> str:
    """Perplexities and accuracies, a row for each model that is deployed."""
    texts = list(one.dense.deployed[0]["losses"])
    spp, rows = one.spp, []
    for entry in (one.dense, one.pruned, *one.entries):
        cells = [_perplexity_cell(one, entry, text) for text in texts]
        accuracy = f"{entry.accuracy:.1%} ± {100 * entry.accuracy_error:.1f}" if entry.has_tasks else "as merged"
        if entry in one.entries and (share := tasks_share(one, entry)):
            accuracy += f" ({share})"
        lead = points(*spp.gain(entry)) if spp not in (None, entry) and entry.has_tasks else "–"
        label = f"**{entry.label}**" if entry in one.spp_entries else entry.label
        rows.append([label, *cells, accuracy, lead])
    names = [text_name(store, text) for text in texts]
    headings = ["", *names, "accuracy", "SPP's lead"]
    return table(headings, rows, numbers_from=1)


def _perplexity_cell(one: Comparison, entry: Entry, text: str) -> str:
    spread = entry.perplexity(text)
    share = f" ({one.won_back(entry, text):.0%})" if entry in one.entries else ""
    return f"{spread.mean:.2f}" + (f" ± {spread.deviation:.2f}" if spread.count > 1 else "") + share


def costs_table(store: Store, comparisons: Sequence[Comparison]) -> str:
    """What each contender trains, saves, and takes."""
    base = store.records[-1].settings["base"]
    profiles = [record for record in store.records if record.kind == "profile" and record.settings["base"] == base]
    steps = profiles[-1].measured if profiles else {}
    contenders: dict[str, Entry] = {}
    for entry in (entry for one in comparisons for entry in one.entries):
        told_by_another = entry.deployment in ("unmerged", "remasked") or entry.settings["equal"] == "time"
        if not told_by_another and "text" not in entry.settings["options"]:
            contenders.setdefault(label_of(entry.settings, None), entry)
    rows = []
    for label, entry in contenders.items():
        measured = steps.get(entry.name)
        ratio, memory = "–", "–"
        if measured:
            rounds = {name: steps[name]["seconds"] for name in (entry.name, "spp")}
            memory = format_bytes(measured["bytes"])
            ratio = "1" if entry.name == "spp" else format_ratio(ratio_summary(rounds, entry.name, "spp"))
        size = format_kilobytes(entry.tuned["adapter_bytes"])
        rows.append([label, f"{entry.tuned['trainable']:,}", size, ratio, memory, f"{entry.zeros_lost:,}"])
    headings = ["", "trained parameters", "adapter", "step ÷ SPP's", "memory of a step", "zeros lost, merged"]
    return table(headings, rows, numbers_from=1)


def rates_table(comparisons: Sequence[Comparison]) -> str:
    """The rates that were tried, where they were."""
    rows: list[list[str]] = []
    for one in comparisons:
        for entry in one.entries:
            if entry.gave_way or entry.deployment in ("unmerged", "remasked"):
                continue
            label, own = label_of(entry.settings, None), entry.settings["rate"]
            known = any(row[:2] == [one.pruning.label, label] for row in rows)
            if known or not entry.rates:
                first = next(
                    (other for other in comparisons[0].entries if label_of(other.settings, None) == label), None
                )
                if first is None or own != first.settings["rate"]:
                    rows.append([one.label, label, f"**{own:g}**"])
                continue
            cells = []
            for rate, loss in sorted(entry.rates.items()):
                text = f"{rate:g}: {'diverged' if loss is None else f'{math.exp(loss):.2f}'}"
                cells.append(f"**{text}**" if rate == own else text)
            edge = len(entry.rates) > 1 and own in (min(entry.rates), max(entry.rates))
            rows.append([one.pruning.label, label, ", ".join(cells) + (" (edge)" if edge else "")])
    return table(["", "", "learning rate: validation perplexity"], rows, numbers_from=3)


def unstable_runs(store: Store) -> str:
    """What became of rates that were the best of short runs and too high for long ones: records of kind `unstable`."""
    runs = [
        prose.UNSTABLE_RUN.format(
            label=METHODS[one.settings["method"]].style.label,
            rate=one.settings["rate"],
            steps=one.settings["steps"],
            pruning=Pruning.of(one.settings["pruning"]).label,
            end=_how_it_ended(one.measured),
        )
        for one in store.records
        if one.kind == UNSTABLE
    ]
    return prose.UNSTABLE.format(runs="; ".join(runs)) if runs else ""


def _how_it_ended(measured: Mapping[str, Any]) -> str:
    if measured["validation_loss"] is None:
        return "it diverged"
    perplexity = math.exp(measured["validation_loss"])
    highest = (
        "its loss was not finite" if measured["max_loss"] is None else f"its loss rose to {measured['max_loss']:.1f}"
    )
    return f"{highest}, and its validation perplexity ended at {perplexity:.0f}"


def reading(store: Store, comparisons: Sequence[Comparison]) -> dict[str, object]:
    """The figures for the sentences on how to read the tables."""
    tasks = comparisons[0].dense.deployed[0]["tasks"]
    counts = ", ".join(f"{name} {len(scores['acc right'])}" for name, scores in tasks.items())
    scores = "; ".join(
        f"{name}: acc {100 * scores['acc']:.1f}, acc_norm {100 * scores['acc_norm']:.1f}"
        for name, scores in tasks.items()
    )
    blocks = store.about["suite"]["budget"]["apart_blocks"]
    return {"counts": counts, "dense": scores, "blocks": blocks, "spread": seed_spread(store, comparisons)}


def seed_spread(store: Store, comparisons: Sequence[Comparison]) -> str:
    """How far the perplexities of one contender are apart over seeds, for those that have one seed."""
    rows = [entry for one in comparisons for entry in one.entries if len(entry.deployed) > 1]
    if not rows:
        return ""
    deviations = []
    for text in rows[0].deployed[0]["losses"]:
        spreads = [entry.perplexity(text) for entry in rows]
        mean = math.sqrt(statistics.fmean((one.deviation / one.mean) ** 2 for one in spreads))
        deviations.append(f"{mean:.1%} on {text_name(store, text)}")
    return " " + prose.SPREAD.format(rows=len(rows), deviations=", ".join(deviations)).strip()


def published(store: Store) -> str:
    """What others measured of the same model, where that is known."""
    return prose.PUBLISHED if model_name(store) == SMOLLM else ""


def method(store: Store) -> str:
    """How it was measured."""
    budget, environment = store.about["suite"]["budget"], store.environments[-1]
    tuned = [one.measured for one in store.records if one.kind in ("tune", "rate")]
    checkpoint, place = store.about["suite"]["models"][0], store.path.parent.name
    return prose.METHOD.format(
        **budget,
        model=model_name(store),
        text=store.about["text"],
        sequence=checkpoint["sequence"],
        dtype=checkpoint["dtype"],
        compute=checkpoint["compute"] or checkpoint["dtype"],
        machine=machines(store),
        count=len(tuned),
        hours=sum(one["cpu_seconds"] for one in tuned) / 3600,
        command=f"python -m benchmarks.quality --suite {store.suite} --model FOLDER --data FOLDER --machine {place}",
        results=store.path.name,
        **{name: environment["versions"][name] for name in ("python", "peft", "transformers")},
    )


def missing(store: Store, comparisons: Sequence[Comparison]) -> str:
    """What the suite has planned and not run yet."""
    if store.about.get("complete"):
        return ""
    left: dict[str, list[str]] = {}
    for study in store.about["suite"]["studies"]:
        pruning = Pruning(**study["pruning"])
        entries = [entry for one in comparisons if one.pruning == pruning for entry in one.entries]
        for planned in study["contenders"]:
            label = label_of(planned, None)
            if not any(_is_of(entry, planned) for entry in entries) and label not in left.setdefault(
                pruning.label, []
            ):
                left[pruning.label].append(label)
    lines = [f"{pruning}: {'; '.join(labels)}." for pruning, labels in left.items() if labels]
    if not lines:
        return ""
    return "## What has not been run yet\n\n" + paragraph(prose.MISSING) + "\n\n" + bullets(lines)


def _is_of(entry: Entry, planned: Mapping[str, Any]) -> bool:
    """Whether an entry is of a contender of the suite, which knows no rank or share that makes it equal to SPP."""
    settings, options = dict(entry.settings), dict(planned["options"])
    if planned["equal"]:
        settings["options"] = options
    return (settings["method"], settings["equal"], dict(settings["options"])) == (
        planned["method"],
        planned["equal"],
        options,
    )
