# SPDX-License-Identifier: Apache-2.0
"""
A whole training step of a random Llama through Transformers: `python -m benchmarks.training_step`.

Forward pass with labels, backward pass, AdamW step, gradients dropped. On CPU the model has 98 million parameters
(hidden 768, intermediate 2048, 12 blocks, vocabulary 8192) and the batch 2 × 512 tokens; on CUDA the model has the
shape of Llama-7B and the batch 4 × 2048 tokens. The linear layers inside the blocks are pruned to 2:4 by magnitude.

All competitors share the frozen weights, so that they are in memory together and take turns. One that does not fit
into the memory of the GPU is left out, and the result says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer
from transformers import LlamaForCausalLM

from .competitors import COMPETITORS, Competitor, styles_of
from .harness import (
    BenchmarkResult,
    Case,
    Contestant,
    contestants_that_fit,
    format_ratio,
    format_seconds,
    make_console,
    measure_interleaved,
    print_table,
)
from .harness import options as opt
from .harness.plots import add_legend, grouped_bars, machine_note, panels, reference_line, save_figure
from .models import PRECISIONS, Precision, build_llama
from .training import (
    MAIN_COMPETITORS,
    MAIN_PRECISIONS,
    TrainingSize,
    TrainingStep,
    choose_size,
    title_of,
)


NAME = "training_step"
REFERENCE = "lora"

app = typer.Typer(add_completion=False)


@app.command()
def main(
    precision: opt.PrecisionOption = MAIN_PRECISIONS,
    checkpointing: opt.CheckpointingOption = opt.Checkpointing.both,
    competitor: opt.DeviceCompetitorOption = None,
    batch: opt.BatchOption = None,
    sequence: opt.SequenceOption = None,
    device: opt.DeviceOption = opt.Device.cpu,
    rounds: opt.RoundsOption = None,
    seconds: opt.SecondsOption = 120.0,
    warmup: opt.WarmupOption = None,
    threads: opt.ThreadsOption = None,
    seed: opt.SeedOption = 0,
    machine: opt.MachineOption = None,
    output_dir: opt.OutputOption = opt.DEFAULT_OUTPUT,
    quick: opt.QuickOption = False,
    plot_only: opt.PlotOnlyOption = None,
) -> None:
    """Time a whole training step of a random Llama."""
    if plot_only is not None:
        draw(opt.load_result(plot_only, NAME), plot_only.with_suffix(".png"))
        return
    competitors = opt.choose("--competitor", competitor or MAIN_COMPETITORS[device], COMPETITORS, required=REFERENCE)
    precisions = opt.choose("--precision", precision, PRECISIONS)
    size = choose_size(device, quick, batch, sequence)
    schedule = opt.make_rounds(device, quick, rounds=rounds, seconds=seconds, warmup=warmup, minimum=4)
    run = opt.start_run(NAME, device, machine, output_dir, threads, quick)

    console = make_console()
    result = run.new_result(
        REFERENCE, competitors=[c.name for c in competitors], weights="random, pruned to 2:4", seed=seed
    )
    for chosen in precisions:
        base = build_llama(size.config(), chosen.dtype, run.device, seed)
        result.settings["size"] = size.describe(base)
        steps = make_steps(competitors, base, size, chosen, seed)
        for enabled in checkpointing.values():
            contestants, left_out = contestants_that_fit(make_contestants(steps, enabled), run.device)
            samples = measure_interleaved(contestants, run.device, schedule, seed)
            values = {name: {"out_of_memory": 1.0} for name in left_out}
            case = Case({"precision": chosen.name, "checkpointing": enabled}, samples, values)
            result.cases.append(case)
            result.save(run.json_path)
            console.print(f"{chosen.name}, checkpointing {'on' if enabled else 'off'}: {len(contestants)} contestants")
        del base, steps, contestants
    report(result)
    draw(result, run.picture_path)
    console.print(f"Written: {run.json_path} and {run.picture_path}")


def make_steps(
    competitors: Sequence[Competitor], base: LlamaForCausalLM, size: TrainingSize, precision: Precision, seed: int
) -> dict[str, TrainingStep]:
    """The training step of every competitor, by name."""
    return {c.name: TrainingStep(c, base, size, precision, seed) for c in competitors}


def make_contestants(steps: dict[str, TrainingStep], checkpointing: bool) -> list[Contestant]:
    """What to time, with or without gradient checkpointing."""
    for step in steps.values():
        step.set_checkpointing(checkpointing)
    return [Contestant(name, step, step.drop_gradients) for name, step in steps.items()]


def report(result: BenchmarkResult) -> None:
    """Print all cases as one table."""
    headings = ["precision", "checkpointing", "method", "rounds", "ms, median (quartiles)", "× LoRA (quartiles)"]
    rows = []
    for case in result.cases:
        checkpointing = "on" if case.parameters["checkpointing"] else "off"
        for name in result.settings["competitors"]:
            row = [case.parameters["precision"], checkpointing, COMPETITORS[name].style.label]
            if name not in case.samples:
                rows.append([*row, "0", "out of memory", ""])
                continue
            ratio = case.ratio(name, result.reference) if result.reference in case.samples else None
            rows.append(
                [
                    *row,
                    str(len(case.samples[name])),
                    format_seconds(case.summary(name)),
                    "" if ratio is None else format_ratio(ratio),
                ]
            )
    print_table(make_console(), headings, rows, numbers_from=3)


def draw(result: BenchmarkResult, path: Path) -> None:
    """Draw the ratios to LoRA: a panel for each precision, groups for gradient checkpointing off and on."""
    precisions = list(dict.fromkeys(case.parameters["precision"] for case in result.cases))
    styles = styles_of(name for name in result.settings["competitors"] if name != result.reference)
    figure, grid = panels(
        1,
        len(precisions),
        "One training step: time relative to LoRA",
        f"{title_of(result.settings)}. Lower is faster; medians, lines from quartile to quartile.\n"
        f"{machine_note(result.environment)}",
        panel_height=3.0,
    )
    grid[0][0].set_ylabel("time ÷ LoRA's time")
    for axes, precision in zip(grid[0], precisions, strict=True):
        cases = [
            case
            for case in result.cases
            if case.parameters["precision"] == precision and result.reference in case.samples
        ]
        groups = [f"checkpointing {'on' if case.parameters['checkpointing'] else 'off'}" for case in cases]
        series = {
            name: [case.ratio(name, result.reference) if name in case.samples else None for case in cases]
            for name in styles
        }
        grouped_bars(axes, groups, series, styles, value_labels_of=["spp"])
        reference_line(axes)
        axes.set_title(PRECISIONS[precision].label)
    add_legend(figure, styles.values(), reference="LoRA")
    save_figure(figure, path)


if __name__ == "__main__":
    app()
