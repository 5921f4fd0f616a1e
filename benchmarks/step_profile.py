# SPDX-License-Identifier: Apache-2.0
"""
Where the time of a training step goes: `python -m benchmarks.step_profile`.

The step of `benchmarks.training_step` under PyTorch's profiler, once each round; the time that operators take without
what they call is summed by kind. It says what a method pays besides the matmuls, and what it would pay without that.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Annotated

import typer
from torch.profiler import ProfilerActivity, profile

from .competitors import COMPETITORS
from .harness import BenchmarkResult, Case, make_console, print_table, summarize
from .harness import options as opt
from .models import PRECISIONS, build_llama
from .training import MAIN_PRECISIONS, TrainingStep, choose_size


NAME = "step_profile"
REFERENCE = "lora"
MAIN_COMPETITORS = ["base", "lora", "masked_full", "spp"]
# the operators of a kind, by the start of their names; all others are "elementwise and copies"
KINDS = {
    "matmuls": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "attention": ("aten::_scaled_dot_product",),
    "passes over W": ("peft_spp::", "_SPPLinear"),
}
OTHER = "elementwise and copies"

app = typer.Typer(add_completion=False)


@app.command()
def main(
    precision: opt.PrecisionOption = MAIN_PRECISIONS,
    checkpointing: opt.CheckpointingOption = opt.Checkpointing.off,
    competitor: opt.CompetitorOption = MAIN_COMPETITORS,
    batch: opt.BatchOption = None,
    sequence: opt.SequenceOption = None,
    rounds: Annotated[int, typer.Option(min=1, help="Profiled steps of each method.")] = 5,
    threads: opt.ThreadsOption = None,
    seed: opt.SeedOption = 0,
    machine: opt.MachineOption = None,
    output_dir: opt.OutputOption = opt.DEFAULT_OUTPUT,
    quick: opt.QuickOption = False,
) -> None:
    """Profile a whole training step of a random Llama on CPU."""
    competitors = opt.choose("--competitor", competitor, COMPETITORS, required=REFERENCE)
    precisions = opt.choose("--precision", precision, PRECISIONS)
    size = choose_size(opt.Device.cpu, quick, batch, sequence)
    run = opt.start_run(NAME, opt.Device.cpu, machine, output_dir, threads, quick)

    console = make_console()
    result = run.new_result(
        REFERENCE,
        competitors=[c.name for c in competitors],
        kinds=[*KINDS, OTHER],
        weights="random, pruned to 2:4",
        seed=seed,
    )
    for chosen in precisions:
        base = build_llama(size.config(), chosen.dtype, run.device, seed)
        result.settings["size"] = size.describe(base)
        steps = {c.name: TrainingStep(c, base, size, chosen, seed) for c in competitors}
        for enabled in checkpointing.values():
            case = Case({"precision": chosen.name, "checkpointing": enabled})
            for step in steps.values():
                step.set_checkpointing(enabled)
                step()
            profiles: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
            for _ in range(2 if quick else rounds):
                for name, step in steps.items():
                    profiles[name].append(seconds_by_kind(step))
            for name, samples in profiles.items():
                case.values[name] = {
                    kind: summarize([sample[kind] for sample in samples]).median for kind in samples[0]
                }
            result.cases.append(case)
            result.save(run.json_path)
        del base, steps
    report(result)
    console.print(f"Written: {run.json_path}")


def seconds_by_kind(step: TrainingStep) -> dict[str, float]:
    """
    Run a training step under the profiler.

    Args:
        step (`TrainingStep`): The step.

    Returns:
        `dict[str, float]`: The seconds of each kind of operator, their own time without what they call.
    """
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    seconds: dict[str, float] = defaultdict(float, dict.fromkeys([*KINDS, OTHER], 0.0))
    for event in profiler.key_averages():
        seconds[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    return dict(seconds)


def kind_of(operator: str) -> str:
    """The kind of an operator, by its name in the profile."""
    return next((kind for kind, starts in KINDS.items() if operator.startswith(starts)), OTHER)


def report(result: BenchmarkResult) -> None:
    """Print all cases as one table."""
    headings = ["precision", "checkpointing", "method", *(f"{kind}, s" for kind in result.settings["kinds"]), "sum, s"]
    rows = []
    for case in result.cases:
        for name, values in case.values.items():
            seconds = [values[kind] for kind in result.settings["kinds"]]
            rows.append(
                [
                    case.parameters["precision"],
                    "on" if case.parameters["checkpointing"] else "off",
                    COMPETITORS[name].style.label,
                    *(f"{value:.3f}" for value in seconds),
                    f"{sum(seconds):.3f}",
                ]
            )
    print_table(make_console(), headings, rows, numbers_from=3)


if __name__ == "__main__":
    app()
