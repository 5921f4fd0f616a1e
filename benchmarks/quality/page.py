# SPDX-License-Identifier: Apache-2.0
"""The page and the pictures, from the results in a folder. Nothing on the page is written by hand."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path

from peft_spp.durable import write_text

from ..harness.plots import machine_note
from . import prose
from .analysis import Analysis, analyze
from .design import Pruning
from .methods import METHODS
from .pictures import draw_parameters, draw_sparsity
from .store import Store
from .suites import SUITES
from .tables import main_table, percent, perplexity, prunings_table, rates_table, table, variations_table


MAIN_SUITES = ("full", "small", "quick")
"""Which suite the page is about: the first of these that there are results of."""
TITLES = {"gpt2": "GPT-2, with `Conv1D` in place of linear layers"}


def write_report(folder: Path, page: Path, quick: bool = False) -> list[Path]:
    """
    Write the page and its pictures from all results of a machine.

    Args:
        folder (`Path`): The machine's results; the pictures go there.
        page (`Path`): The page.
        quick (`bool`): Whether to take the results of quick runs, and only these.

    Returns:
        `list[Path]`: The files written.
    """
    stores = read_stores(folder, quick)
    main = next((stores[name] for name in MAIN_SUITES if name in stores), None)
    parts, written = ["# Quality: what fine-tuning wins back", paragraph(prose.OPENING)], [page]
    if main is not None:
        analysis = analyze(main)
        pictures = {name: main.path.with_name(f"{main.path.stem}-{name}.png") for name in ("sparsity", "parameters")}
        model, environment = first_model(analysis), main.environments[-1]
        draw_sparsity(analysis, model, environment, pictures["sparsity"])
        draw_parameters(analysis, model, environment, pictures["parameters"])
        written += pictures.values()
        parts += main_parts(analysis, {name: _relative(path, page) for name, path in pictures.items()})
    if "ablation" in stores:
        parts += ablation_parts(analyze(stores["ablation"]))
    parts += llama_parts(stores.get("llama"))
    parts += ["## PEFT's own comparison", paragraph(prose.PEFT)]
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, "\n\n".join(part for part in parts if part) + "\n")
    return written


def read_stores(folder: Path, quick: bool) -> dict[str, Store]:
    """The results of all suites in a folder, by the name of the suite."""
    stores = {}
    for path in sorted(folder.glob("quality-*.json")):
        if path.stem.endswith("-quick") == quick:
            name = "quick" if quick else path.stem.removeprefix("quality-")
            stores[name] = Store.open(path, name)
    return stores


def main_parts(analysis: Analysis, pictures: Mapping[str, str]) -> list[str]:
    """What the suite found on the models that were trained here."""
    model, *others = dict.fromkeys(one.model for one in analysis.outcomes)
    others_table = prunings_table(analysis, model)
    parts = [
        "" if analysis.store.about.get("complete") else paragraph(prose.INCOMPLETE),
        "## What was found",
        *(paragraph(finding(analysis, model, pruning)) for pruning in gridded(analysis, model)),
        f"![Won back, by trained parameters]({pictures['parameters']})",
        "## All methods",
        not_measured(analysis),
        *main_tables(analysis, model),
        paragraph(prose.HOW_TO_READ),
    ]
    if others_table.count("\n") > 1:
        parts += [
            "## All prunings",
            paragraph(prose.ALL_PRUNINGS) if analysis.store.suite == "small" else "",
            others_table,
            f"![Won back, by sparsity]({pictures['sparsity']})",
        ]
    for other in others:
        parts += [f"## {TITLES.get(other, other)}", *main_tables(analysis, other)]
    parts += ["## Learning rates", paragraph(prose.RATES)]
    parts += [rates_table(analysis, name, gridded(analysis, name)) for name in (model, *others)]
    return [*parts, "## How it was measured", bullets(_facts(analysis)), _models_table(analysis)]


def not_measured(analysis: Analysis) -> str:
    """The methods of the suite, as it is now, that there are no results of."""
    suite = SUITES.get(analysis.store.suite)
    planned = dict.fromkeys(one.method for study in suite.studies for one in study.contenders) if suite else {}
    names = [METHODS[name].style.label for name in planned if not any(one.method == name for one in analysis.outcomes)]
    return paragraph(prose.NOT_MEASURED.format(names=", ".join(names))) if names else ""


def main_tables(analysis: Analysis, model: str) -> list[str]:
    """The table of each pruning that methods chose a rate for, with its name."""
    prunings = gridded(analysis, model)
    return [part for one in prunings for part in (f"**{one.label}**", main_table(analysis, model, one))]


def finding(analysis: Analysis, model: str, pruning: Pruning) -> str:
    """What each method with its defaults reached on a pruned model, the best first, and what was lost."""
    dense, pruned = (math.exp(analysis.losses[model, name]) for name in (None, pruning.name))
    shown = [one for one in analysis.of(model, pruning) if one.equal is None and one.deployment != "unmerged"]
    ranked = sorted(shown, key=lambda one: one.perplexity.mean)
    reached = "; ".join(f"{one.label} {perplexity(one)} ({percent(one.recovery)})" for one in ranked)
    spp = [one for one in ranked if one.method.startswith("spp")]
    lost = sum(count or 0 for one in spp for count in one.deployed("zeros_lost"))
    return (
        f"**{pruning.label}**: pruning takes the perplexity from {dense:.2f} to {pruned:.2f}, and tuning brings it to "
        f"(in brackets: the share of the log-perplexity that is won back): {reached}. SPP lost {lost} zeros in "
        f"{sum(len(one.runs) for one in spp)} models."
    )


def ablation_parts(analysis: Analysis) -> list[str]:
    """What SPP's settings do."""
    store = analysis.store
    incomplete = "" if store.about.get("complete") else paragraph(prose.INCOMPLETE)
    parts = ["## SPP's settings", incomplete, paragraph(prose.SETTINGS.format(**store.about["suite"]["budget"]))]
    for model, pruning in analysis.studied:
        parts += [f"{model}, {pruning.label}:", variations_table(analysis, model, pruning)]
    return [*parts, f"Measured with `{_command(store)}`."]


def llama_parts(store: Store | None) -> list[str]:
    """What was found on published checkpoints, or how that is to be found out."""
    if store is None:
        return ["## Real checkpoints", paragraph(prose.NOT_RUN)]
    analysis, tasks = analyze(store), store.about["suite"]["budget"]["tasks"]
    rows = []
    for model, pruning in analysis.studied:
        for one in analysis.of(model, pruning):
            scores = one.deployed("tasks")[0] or {}
            cells = [f"{scores[task].get('acc', math.nan):.3f}" if task in scores else "–" for task in tasks]
            rows.append([model, one.label, f"{one.perplexity.mean:.2f}", *cells])
    return ["## Real checkpoints", table(["", "", "perplexity", *tasks], rows), f"Measured with `{_command(store)}`."]


def paragraph(text: str) -> str:
    """Text in lines of at most 119 characters."""
    return textwrap.fill(text.strip(), 119, break_long_words=False, break_on_hyphens=False)


def bullets(items: Iterable[str]) -> str:
    """A list of such texts."""
    return "\n".join(
        textwrap.fill(
            item.strip(),
            119,
            initial_indent="- ",
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for item in items
    )


def gridded(analysis: Analysis, model: str) -> list[Pruning]:
    """The prunings that methods chose a learning rate of their own for."""
    prunings = [pruning for name, pruning in analysis.studied if name == model]
    return [p for p in prunings if any(len(one.rates) > 1 for one in analysis.of(model, p))] or prunings[:1]


def first_model(analysis: Analysis) -> str:
    """The model that was measured first."""
    return analysis.outcomes[0].model


def _facts(analysis: Analysis) -> list[str]:
    store = analysis.store
    budget, environment = store.about["suite"]["budget"], store.environments[-1]
    tuned = [record.measured for record in store.records if record.kind == "tune"]
    runs = len(store.environments)
    return [
        prose.TEXT.format(source=store.about["text"]),
        prose.BASES.format(calibration=budget["calibration_blocks"]),
        prose.TUNING.format(tokens=tuned[0]["tokens"], **budget),
        prose.DEPLOYED,
        prose.PERPLEXITY.format(test=budget["test_blocks"])
        + ("" if budget["exact_match_problems"] else prose.NO_ANSWERS),
        prose.MACHINE.format(
            machine=machine_note(environment),
            count=len(tuned),
            wall=sum(one["seconds"] for one in tuned) / 60,
            cpu=sum(one["cpu_seconds"] for one in tuned) / 60,
            **{name: environment["versions"][name] for name in ("python", "peft", "transformers")},
        ),
        f"Command: `{_command(store)}`; results: `{_shown(store.path)}`"
        + (f", in {runs} runs, of which each resumed what was missing." if runs > 1 else "."),
    ]


def _models_table(analysis: Analysis) -> str:
    on_cpu = analysis.store.environments[-1]["hardware"]["gpu"] is None
    clock, heading = ("cpu_seconds", "processor time") if on_cpu else ("seconds", "time")
    rows = []
    for record in analysis.store.records:
        name = record.settings["model"]
        if record.kind != "base" or record.settings["pruning"] is not None:
            continue
        training = record.measured["training"]
        rows.append(
            [
                name,
                f"{record.measured['parameters'] / 1e6:.1f}M",
                f"{training['tokens'] / 1e6:.1f}M",
                f"{training[clock] / 60:.1f} min",
                f"{math.exp(record.measured['test_loss']):.2f}",
                *(_pruned_cell(analysis, name, pruning) for pruning in ("wanda-2:4", "wanda-0.75")),
            ]
        )
    headings = ["model", "parameters", "tokens", heading, "perplexity", "Wanda 2:4", "Wanda 75%"]
    return table(headings, rows, numbers_from=1)


def _pruned_cell(analysis: Analysis, model: str, pruning: str) -> str:
    loss = analysis.losses.get((model, pruning))
    if loss is None:
        return "–"
    return f"{math.exp(loss):.2f} (+{math.exp(loss - analysis.losses[model, None]) - 1:.0%})"


def _command(store: Store) -> str:
    """The command of the last run."""
    return str(store.environments[-1]["command"])


def _relative(path: Path, page: Path) -> str:
    return Path(os.path.relpath(path.resolve(), page.resolve().parent)).as_posix()


def _shown(path: Path) -> str:
    return path.name if path.is_absolute() else path.as_posix()
