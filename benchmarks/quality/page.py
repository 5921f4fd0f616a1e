# SPDX-License-Identifier: Apache-2.0
"""The page and the pictures, from the results in a folder. Nothing on the page is written by hand."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_spp.durable import write_text

from ..harness.plots import machine_note
from .analysis import Analysis, Outcome, analyse
from .claims import claims_of
from .pictures import draw_parameters, draw_sparsity
from .store import Store
from .suites import Pruning
from .tables import main_table, prunings_table, rates_table, table, variations_table


MAIN_SUITES = ("full", "small", "quick")
"""Which suite the page is about: the first of these that there are results of."""


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
    parts, written = [_opening(page, stores)], []
    if main is not None:
        analysis = analyse(main)
        pictures = _draw(analysis, main, folder)
        written += list(pictures.values())
        parts += _main_parts(analysis, pictures, page)
    if "ablation" in stores:
        parts.append(_ablation_part(analyse(stores["ablation"])))
    parts.append(_llama_part(stores.get("llama")))
    parts.append(_peft_part(page))
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, "\n\n".join(part for part in parts if part) + "\n")
    return [page, *written]


def read_stores(folder: Path, quick: bool) -> dict[str, Store]:
    """The results of all suites in a folder, by the name of the suite."""
    stores = {}
    for path in sorted(folder.glob("quality-*.json")):
        if path.stem.endswith("-quick") == quick:
            name = "quick" if quick else path.stem.removeprefix("quality-")
            stores[name] = Store.open(path, name)
    return stores


def _draw(analysis: Analysis, store: Store, folder: Path) -> dict[str, Path]:
    pictures = {name: folder / f"quality-{store.suite}-{name}.png" for name in ("sparsity", "parameters")}
    model, environment = _first_model(analysis), store.environments[-1]
    draw_sparsity(analysis, model, environment, pictures["sparsity"])
    draw_parameters(analysis, model, environment, pictures["parameters"])
    return pictures


def _opening(page: Path, stores: Mapping[str, Store]) -> str:
    return "\n\n".join(
        [
            "# Quality: what fine-tuning wins back",
            paragraph(
                "Pruning costs a model quality. How much of it does SPP win back, with the zeros kept, and how much do "
                "the methods that it competes with? This page is written by `python -m benchmarks.quality` from "
                "the JSON files that it names; nothing on it is written by hand."
            ),
        ]
    )


def _main_parts(analysis: Analysis, pictures: Mapping[str, Path], page: Path) -> list[str]:
    model = _first_model(analysis)
    gridded = _gridded(analysis, model)
    parts = [
        "## What was found",
        _claims(analysis, model),
        *(_comparisons(analysis, model, pruning) for pruning in gridded),
        "## How it was measured",
        _method(analysis),
        _models_table(analysis),
        "## All methods",
        paragraph(
            "*Won back*: the share of the log-perplexity lost by pruning, 100% being the dense model. *Of masked full*: "
            "what was won back over what full fine-tuning with masked gradients won back, with the same seed. ± is the "
            "standard deviation over seeds. *Step*: the median of the ratios of single steps, measured side by side in "
            "interleaved rounds. *Memory of a step*: adapter, gradients, state of the optimizer and activations, above "
            "the pruned model, counted. An `r=8` with as many parameters as SPP has is the nearest that there is."
        ),
        main_table(analysis, model, gridded),
        f"![Won back, by trained parameters]({_relative(pictures['parameters'], page)})",
    ]
    others = prunings_table(analysis, model)
    if others.count("\n") > 1:
        parts += [
            "## All prunings",
            paragraph(
                "Perplexity, and in brackets what was won back. Wanda's 2:4 and 75% have three seeds and learning rates "
                "of their own; the others have one seed, at the rates of whichever of these two is closer in sparsity."
            ),
            others,
            f"![Won back, by sparsity]({_relative(pictures['sparsity'], page)})",
        ]
    for other in dict.fromkeys(one.model for one in analysis.outcomes if one.model != model):
        parts += [
            f"## {MODEL_TITLES.get(other, other)}",
            "One seed, with learning rates of its own." if _single_seed(analysis, other) else "",
            main_table(analysis, other, _gridded(analysis, other)),
        ]
    parts += [
        "## Learning rates",
        paragraph(
            "Each method's rate is the one with the lowest perplexity on the validation text, with the first seed. "
            "Where the best was at the edge of the grid, the grid was extended up to twice; *(edge)* says that it still "
            "is at the edge."
        ),
        *(
            rates_table(analysis, name, _gridded(analysis, name))
            for name in dict.fromkeys(one.model for one in analysis.outcomes)
        ),
    ]
    return parts


MODEL_TITLES = {"gpt2": "GPT-2, with Conv1D in place of linear layers"}


def _claims(analysis: Analysis, model: str) -> str:
    claims = claims_of(analysis, model)
    lines = [
        textwrap.fill(
            f"{'**Holds.**' if claim.holds else '**Does not hold.**'} {claim.text}: {claim.evidence}.",
            119,
            initial_indent="- ",
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for claim in claims
    ]
    return "\n".join(lines)


def _comparisons(analysis: Analysis, model: str, pruning: Pruning) -> str:
    """SPP beside the methods that have more parameters or take longer, as measured."""
    spp = analysis.find(model, pruning, "spp")
    if spp is None:
        return ""
    sentences = []
    for outcome in analysis.of(model, pruning):
        if outcome.method not in ("hira", "masked_lora"):
            continue
        if outcome.equal == "parameters":
            basis = f"with {outcome.measured('trainable') / spp.measured('trainable'):.2f} times SPP's parameters"
        elif outcome.equal == "time":
            basis = f"in SPP's time ({outcome.runs[0].settings['steps']} steps for {spp.runs[0].settings['steps']})"
        else:
            basis = f"at equal tokens, {outcome.measured('trainable') / spp.measured('trainable'):.1f} times the parameters"
        label = outcome.label.partition(";")[0]
        sentences.append(f"{label} {basis}: {outcome.perplexity.mean:.2f} ({_verdict(spp, outcome)})")
    if not sentences:
        return ""
    return paragraph(
        f"{pruning.label}, perplexity, SPP {spp.perplexity.mean:.2f} (± {spp.perplexity.deviation:.2f}). "
        + "; ".join(sentences)
        + "."
    )


def _verdict(spp: Outcome, other: Outcome) -> str:
    wins = sum(own < theirs for own, theirs in zip(spp.losses, other.losses, strict=False))
    count = min(len(spp.losses), len(other.losses))
    return f"SPP better with {wins} of {count} seeds"


def _method(analysis: Analysis) -> str:
    store = analysis.store
    suite, environment = store.about["suite"], store.environments[-1]
    budget, versions = suite["budget"], environment["versions"]
    tuned = [record for record in store.records if record.kind == "tune"]
    seconds = sum(record.measured["seconds"] for record in tuned)
    cpu = sum(record.measured["cpu_seconds"] for record in tuned)
    tokens = tuned[0].measured["tokens"] if tuned else 0
    machine = environment["hardware"]
    facts = [
        f"Text: {store.about['text']}. Validation and test text are held out, with no paragraph in common.",
        "Base models are trained from scratch by the benchmark (AdamW, cosine, bfloat16 autocast), pruned in one shot, "
        f"calibrated on {budget['calibration_blocks']} sequences of training text.",
        f"Every method gets the same {tokens:,} tokens in the same order ({budget['steps']} steps of {budget['batch']} "
        "sequences, in float32; AdamW, 10% warm-up, cosine to zero, gradients clipped to 1, no weight decay, no dropout), "
        "adapts all linear layers inside the transformer blocks, and leaves embeddings, norms and head as they are.",
        "What is measured is the deployed model: the adapter is saved, merged into the pruned model from disk, the result "
        "saved as safetensors and loaded again by plain Transformers. LoRA is trained once and deployed in three ways.",
        f"Perplexity is over {budget['test_blocks']} sequences of test text. GSM8K answers are not asked for: these "
        "models are far too weak to have any right."
        if not budget["exact_match_problems"]
        else f"Perplexity is over {budget['test_blocks']} sequences of test text.",
        f"Machine: {machine_note(environment)}, Python {versions['python']}, PEFT {versions['peft']}, Transformers "
        f"{versions['transformers']}. Other work ran on the machine meanwhile, so the times of whole runs are noisy: all "
        f"{len(tuned)} runs of fine-tuning together took {seconds / 60:.0f} minutes of wall time and {cpu / 60:.0f} minutes "
        f"of processor time. Ratios of steps are from interleaved rounds.",
        f"Command: `{_command(environment)}`; results in `{_shown(store.path)}`"
        + (f", from {len(store.environments)} runs, each resumed." if len(store.environments) > 1 else "."),
    ]
    return "\n".join(
        textwrap.fill(
            fact, 119, initial_indent="- ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
        for fact in facts
    )


def _models_table(analysis: Analysis) -> str:
    rows = []
    for record in analysis.store.records:
        if record.kind != "base" or (record.settings["model"], record.settings["pruning"]) not in analysis.losses:
            continue
        if record.settings["pruning"] is not None:
            continue
        training = record.measured["training"]
        rows.append(
            [
                record.settings["model"],
                f"{record.measured['parameters'] / 1e6:.1f}M",
                f"{training['tokens'] / 1e6:.1f}M" if training else "–",
                f"{training['seconds'] / 60:.1f} min" if training else "–",
                f"{math.exp(record.measured['test_loss']):.2f}",
                *(
                    _pruned_cell(analysis, record.settings["model"], pruning)
                    for pruning in ("wanda-2:4", "wanda-0.75")
                ),
            ]
        )
    return table(
        ["model", "parameters", "tokens trained on", "in", "perplexity", "Wanda 2:4", "Wanda 75%"],
        rows,
        numbers_from=1,
    )


def _pruned_cell(analysis: Analysis, model: str, pruning: str) -> str:
    loss = analysis.losses.get((model, pruning))
    if loss is None:
        return "–"
    return f"{math.exp(loss):.2f} (+{math.exp(loss - analysis.losses[model, None]) - 1:.0%})"


def _ablation_part(analysis: Analysis) -> str:
    parts = ["## SPP's settings"]
    budget = analysis.store.about["suite"]["budget"]
    parts.append(
        paragraph(
            "One setting changed at a time, each at the best of its learning rates on the validation text, in "
            f"{budget['steps']} steps of {budget['batch']} sequences. `scaling` is s = alpha / r (2 by default); "
            "`B_rate_ratio` is the learning rate of B over that of A, as in LoRA+; `A = ones` and `A = positive` draw A as "
            "ones or as the absolute values of the usual draws; `dtype` is that of the base model and `factors` that of A "
            "and B (float32 by default); `B = random` is the adapter that does not start as the identity. Largest loss: "
            "over all steps and all rates, so an explosion shows there."
        )
    )
    for model, pruning in analysis.studied:
        seeds = max(len(one.runs) for one in analysis.of(model, pruning))
        parts += [
            f"{pruning.label}, {seeds} seed{'s' if seeds > 1 else ''}:",
            variations_table(analysis, model, pruning),
        ]
    environment = analysis.store.environments[-1]
    parts.append(f"Measured with `{_command(environment)}`.")
    return "\n\n".join(parts)


def _llama_part(store: Store | None) -> str:
    heading = "## Real checkpoints"
    command = "`accelerate launch -m benchmarks.quality --suite llama --device cuda --data FOLDER`"
    if store is None:
        return "\n\n".join(
            [
                heading,
                paragraph(
                    f"{command} fine-tunes published pruned checkpoints (Llama-3.1-8B by Wanda at 2:4 and 50%, "
                    "Sparse-Llama-3.1-8B-2of4, Llama-2-7b-pruned70-retrained) by SPP, HiRA, LoRA and masked LoRA, and "
                    "evaluates them on the tasks of the paper by lm-evaluation-harness (`pip install "
                    '"peft-spp[quality]"`). **It has not been run on these checkpoints yet**; the tests run it on a tiny '
                    "local model with a local task."
                ),
            ]
        )
    analysis = analyse(store)
    tasks = store.about["suite"]["budget"]["tasks"]
    rows = []
    for model, pruning in analysis.studied:
        for one in analysis.of(model, pruning):
            scores = one.deployed("tasks")[0] or {}
            cells = [f"{scores[task].get('acc', math.nan):.3f}" if task in scores else "–" for task in tasks]
            rows.append([model, one.label, f"{one.perplexity.mean:.2f}", *cells])
    return "\n\n".join([heading, table(["", "", "perplexity", *tasks], rows)])


def _peft_part(page: Path) -> str:
    return "\n\n".join(
        [
            "## PEFT's own comparison",
            paragraph(
                "`benchmarks/quality/metamathqa` holds settings for PEFT's `method_comparison/MetaMathQA`, so that SPP can "
                "be run beside LoRA and HiRA there. That needs a GPU and has not been run."
            ),
        ]
    )


def paragraph(text: str) -> str:
    """Text in lines of at most 119 characters."""
    return textwrap.fill(text, 119, break_long_words=False, break_on_hyphens=False)


def _gridded(analysis: Analysis, model: str) -> list[Pruning]:
    """The prunings that methods chose a learning rate of their own for."""
    prunings = [pruning for name, pruning in analysis.studied if name == model]
    with_grid = [p for p in prunings if any(len(one.rates) > 1 for one in analysis.of(model, p))]
    return with_grid or prunings[:1]


def _single_seed(analysis: Analysis, model: str) -> bool:
    return all(len(one.runs) == 1 for one in analysis.outcomes if one.model == model)


def _first_model(analysis: Analysis) -> str:
    return analysis.outcomes[0].model


def _command(environment: Mapping[str, Any]) -> str:
    """The command, without the machine's own paths."""
    words: Sequence[str] = environment["command"].split()
    return " ".join("FOLDER" if word.startswith(("/", "~")) else word for word in words)


def _relative(path: Path, page: Path) -> str:
    return Path(os.path.relpath(path, page.parent)).as_posix()


def _shown(path: Path) -> str:
    return path.as_posix() if not path.is_absolute() else path.name
