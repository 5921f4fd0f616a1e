# SPDX-License-Identifier: Apache-2.0
"""
Forward pass of one adapted linear layer on a few tokens, as in generation: `python -m benchmarks.decode`.

Eval mode under `torch.inference_mode`, the adapter not merged. With so few tokens the time is that of reading the
weight. In a real model the weight of a layer comes from memory, since all other layers have been read since its last
use; so here the calls cycle through several weights, which together must be larger than the last-level cache
(`--working-set-mib`). A sample is as many calls as take 20 ms, and the result is the time of one call.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

from .competitors import COMPETITORS, Competitor, styles_of
from .harness import (
    BenchmarkResult,
    Case,
    Contestant,
    Rounds,
    format_ratio,
    format_seconds,
    make_console,
    measure_interleaved,
    print_table,
    repeated,
    repetitions_for,
)
from .harness import options as opt
from .harness.plots import add_legend, machine_note, panels, ratio_lines, reference_line, save_figure
from .models import PRECISIONS, LinearStack, Precision, build_linear_stack, copy_with_shared_weights


NAME = "decode"
REFERENCE = "base"
SAMPLE_SECONDS = 0.02
SHAPES = ["2048x2048", "11008x4096", "4096x11008"]
TOKENS = [1, 2, 4, 8, 16, 32, 64]
MAIN_PRECISIONS = ["fp32", "bf16"]
MAIN_COMPETITORS = ["base", "lora", "hira", "spp_authors_repeat", "spp_authors_loop", "spp"]

app = typer.Typer(add_completion=False)


@app.command()
def main(
    shape: opt.ShapeOption = SHAPES,
    tokens: Annotated[list[int], typer.Option(min=1, help="Rows of x. May be repeated.")] = TOKENS,
    precision: opt.PrecisionOption = MAIN_PRECISIONS,
    competitor: opt.CompetitorOption = MAIN_COMPETITORS,
    working_set_mib: Annotated[
        int, typer.Option(min=1, help="The weights that calls cycle through have at least this size together.")
    ] = 512,
    device: opt.DeviceOption = opt.Device.cpu,
    rounds: opt.RoundsOption = None,
    seconds: opt.SecondsOption = 8.0,
    warmup: opt.WarmupOption = None,
    threads: opt.ThreadsOption = None,
    seed: opt.SeedOption = 0,
    machine: opt.MachineOption = None,
    output_dir: opt.OutputOption = opt.DEFAULT_OUTPUT,
    quick: opt.QuickOption = False,
    plot_only: opt.PlotOnlyOption = None,
) -> None:
    """Time the forward pass of one adapted linear layer on a few tokens."""
    if plot_only is not None:
        draw(opt.load_result(plot_only, NAME), plot_only.with_suffix(".png"))
        return
    competitors = opt.choose("--competitor", competitor, COMPETITORS, required=REFERENCE)
    precisions = opt.choose("--precision", precision, PRECISIONS)
    shapes, token_counts = opt.parse_shapes(shape), sorted(set(tokens))
    sample_seconds, working_set = SAMPLE_SECONDS, working_set_mib * 2**20
    if quick:
        shapes, token_counts = [(32, 16)], [1, 2]
        sample_seconds, working_set = 1e-4, 2**13
    schedule = opt.make_rounds(device, quick, rounds=rounds, seconds=seconds, warmup=warmup, minimum=5, maximum=15)
    run = opt.start_run(NAME, device, machine, output_dir, threads, quick)

    console = make_console()
    result = run.new_result(
        REFERENCE,
        competitors=[c.name for c in competitors],
        weights="random, pruned to 2:4",
        seed=seed,
        working_set_bytes=working_set,
        sample_seconds=sample_seconds,
    )
    for (m, n), chosen in itertools.product(shapes, precisions):
        count = max(math.ceil(working_set / (m * n * chosen.dtype.itemsize)), 2)
        base = build_linear_stack(m, n, count, chosen.dtype, run.device, seed)
        layers = adapt_layers(competitors, base)
        for number in token_counts:
            contestants = make_contestants(layers, number, n, chosen, run.device)
            case = measure(contestants, run.device, schedule, sample_seconds, seed)
            case.parameters.update(shape=[m, n], tokens=number, precision=chosen.name, distinct_weights=count)
            result.cases.append(case)
            result.save(run.json_path)
            console.print(f"{m}x{n}, {number} tokens, {chosen.name}; rounds: {len(case.samples[REFERENCE])}")
        del base, layers, contestants
    report(result)
    draw(result, run.picture_path)
    console.print(f"Written: {run.json_path} and {run.picture_path}")


def adapt_layers(competitors: Sequence[Competitor], base: LinearStack) -> dict[str, list[nn.Module]]:
    """The layers of every competitor, by its name; all competitors share the weights."""
    layers = {}
    for one in competitors:
        stack = copy_with_shared_weights(base)
        one.adapt(stack)
        layers[one.name] = stack.eval().linears()
    return layers


def make_contestants(
    layers: dict[str, list[nn.Module]], tokens: int, in_features: int, precision: Precision, device: torch.device
) -> list[Contestant]:
    """
    The contestants of one case; a call is that of the next layer in turn.

    Args:
        layers (`dict[str, list[nn.Module]]`): As [`adapt_layers`] gives them.
        tokens (`int`): The rows of the input.
        in_features (`int`): Its columns.
        precision (`Precision`): Its dtype, and whether autocast is on.
        device (`torch.device`): Where the layers are.
    """
    x = torch.randn(1, tokens, in_features, dtype=precision.dtype, device=device)
    # one turn for all: the next weight is the one that none of the contestants has read for the longest time
    turn = itertools.count()
    return [Contestant(name, partial(_call_next, own, turn, x, precision)) for name, own in layers.items()]


def _call_next(layers: list[nn.Module], turn: Iterator[int], x: torch.Tensor, precision: Precision) -> None:
    layer = layers[next(turn) % len(layers)]
    # a context for each call, so that autocast keeps no casts from one to the next
    with torch.inference_mode(), precision.context(x.device):
        layer(x)


def measure(
    contestants: Sequence[Contestant], device: torch.device, rounds: Rounds, sample_seconds: float, seed: int
) -> Case:
    """Time the contestants of one case, each repeated until a sample is long enough."""
    repetitions = {c.name: repetitions_for(c.run, device, sample_seconds) for c in contestants}
    samples = measure_interleaved([repeated(c, repetitions[c.name]) for c in contestants], device, rounds, seed)
    return Case(
        parameters={},
        samples={name: [time / repetitions[name] for time in times] for name, times in samples.items()},
        values={name: {"calls_per_sample": float(count)} for name, count in repetitions.items()},
    )


def report(result: BenchmarkResult) -> None:
    """Print all cases as one table."""
    headings = ["m×n", "precision", "tokens", "method", "rounds", "ms, median (quartiles)", "× base (quartiles)"]
    rows = []
    for case in result.cases:
        m, n = case.parameters["shape"]
        for name, samples in case.samples.items():
            rows.append(
                [
                    f"{m}×{n}",
                    case.parameters["precision"],
                    str(case.parameters["tokens"]),
                    COMPETITORS[name].style.label,
                    str(len(samples)),
                    format_seconds(case.summary(name)),
                    format_ratio(case.ratio(name, result.reference)),
                ]
            )
    print_table(make_console(), headings, rows, numbers_from=4)


def draw(result: BenchmarkResult, path: Path) -> None:
    """Draw the ratios to the base layer over tokens: a row of panels for each precision, a column for each shape."""
    shapes = list(dict.fromkeys(tuple(case.parameters["shape"]) for case in result.cases))
    precisions = list(dict.fromkeys(case.parameters["precision"] for case in result.cases))
    styles = styles_of(name for name in result.settings["competitors"] if name != result.reference)
    figure, grid = panels(
        len(precisions),
        len(shapes),
        "Forward pass on a few tokens, adapter not merged: time relative to the base layer",
        "Lower is faster; medians, lines from quartile to quartile. Weights come from memory, not from a cache.\n"
        f"{machine_note(result.environment)}",
        share_y=True,
    )
    for row, precision in zip(grid, precisions, strict=True):
        row[0].set_ylabel("time ÷ base layer's time")
        for axes, shape in zip(row, shapes, strict=True):
            cases = [
                case
                for case in result.cases
                if (tuple(case.parameters["shape"]), case.parameters["precision"]) == (shape, precision)
            ]
            series = {name: [case.ratio(name, result.reference) for case in cases] for name in styles}
            ratio_lines(axes, [case.parameters["tokens"] for case in cases], series, styles)
            reference_line(axes)
            axes.set_title(f"W {shape[0]}×{shape[1]}, {PRECISIONS[precision].label}")
    for axes in grid[-1]:
        axes.set_xlabel("tokens")
    add_legend(figure, styles.values(), reference="Frozen base", lines=True)
    save_figure(figure, path)


if __name__ == "__main__":
    app()
