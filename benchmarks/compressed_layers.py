# SPDX-License-Identifier: Apache-2.0
"""
Compressed weights layer by layer, on CPU: `OMP_WAIT_POLICY=passive python -m benchmarks.compressed_layers`.

A forward pass of few tokens, without and with an adapter that is not merged, next to `F.linear`, to the weight
prepacked by oneDNN (which is what `torch.compile` with freezing uses), and to an own kernel for dense weights of the
same make: what is won over that one is due to the zeros, the rest to the kernel. In bfloat16 bitsandbytes and OpenVINO
run the same layer, where they are installed. And making W' from the compressed weight next to making it from the dense
one, as a whole and in the chunks that the layer uses.

Calls cycle through several weights, as in `benchmarks.decode`. Each case is there twice: by the time that the threads
were computing, which other programs on the machine disturb less, and by the time that went by.
`ATEN_CPU_CAPABILITY=avx2` measures the kernels for such processors, next to what PyTorch and oneDNN then do
(`ONEDNN_MAX_CPU_ISA=AVX2`).
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Annotated

import torch
import typer

from peft_spp.functional.kernels.cpu import bitmask

from .compressed_contestants import RANK, TRAINING_TOKENS, Layers, prune
from .dense_tokens import TOKENS
from .harness import (
    BenchmarkResult,
    Case,
    Contestant,
    format_ratio,
    format_seconds,
    make_console,
    measure_cpu_time,
    print_table,
    repeated,
    repetitions_for,
)
from .harness import options as opt
from .harness.plots import (
    BLACK,
    BLUE,
    GRAY,
    GREEN,
    ORANGE,
    PURPLE,
    SKY_BLUE,
    VERMILLION,
    YELLOW,
    Style,
    add_legend,
    machine_note,
    panels,
    ratio_lines,
    reference_line,
    save_figure,
)
from .models import PRECISIONS
from .other_layers import LABELS as OTHER_LABELS


NAME = "compressed_layers"
# each tier has its own file of results
NAMES = {f"{NAME}_avx2": "avx2", f"{NAME}_portable": "portable", NAME: "avx512"}
REFERENCE = "dense"
SAMPLE_SECONDS = 0.02
SHAPES = ["4096x4096", "11008x4096"]
SPARSITIES = ["0.5", "2:4", "0.75"]
LABELS = {
    "dense": "F.linear",
    "prepacked": "prepacked by oneDNN",
    "own dense": "own kernel, dense",
    "compressed": "compressed",
    "dense, adapter": "SPP on the dense weight",
    "compressed, adapter": "SPP on the compressed weight",
    "copy": "copy of W",
    **OTHER_LABELS,
}
STYLES = {
    "compressed": (VERMILLION, "o"),
    "compressed, adapter": (ORANGE, "s"),
    "own dense": (GREEN, "^"),
    "prepacked": (BLUE, "v"),
    "openvino 16 bit": (SKY_BLUE, "D"),
    "openvino 8 bit": (PURPLE, "P"),
    "bitsandbytes 8 bit": (GRAY, "X"),
    "bitsandbytes 4 bit": (YELLOW, "d"),
    "dense, adapter": (BLACK, "."),
}
TASK_LABELS = {
    "w": "W', whole",
    "w in chunks": "W' in chunks",
    "training": f"SPP, forward and backward, {TRAINING_TOKENS} tokens",
}

app = typer.Typer(add_completion=False)


@app.command()
def main(
    shape: opt.ShapeOption = SHAPES,
    precision: opt.PrecisionOption = ["bf16", "fp32"],  # noqa: B006
    sparsity: Annotated[list[str], typer.Option(help="The share of zeros in each row, or N:M. May be repeated.")] = [  # noqa: B006
        *SPARSITIES
    ],
    tokens: Annotated[list[int], typer.Option(help="Rows of x: 1, 2, 4 or 8. May be repeated.")] = [*TOKENS],  # noqa: B006
    working_set_mib: Annotated[
        int, typer.Option(min=1, help="The dense weights that calls cycle through have at least this size together.")
    ] = 192,
    rounds: opt.RoundsOption = None,
    seconds: opt.SecondsOption = 6.0,
    warmup: opt.WarmupOption = None,
    threads: opt.ThreadsOption = None,
    seed: opt.SeedOption = 0,
    machine: opt.MachineOption = None,
    output_dir: opt.OutputOption = opt.DEFAULT_OUTPUT,
    plot_only: opt.PlotOnlyOption = None,
    quick: opt.QuickOption = False,
) -> None:
    """Time compressed weights next to dense ones."""
    if plot_only is not None:
        name = next((name for name in NAMES if plot_only.name.startswith(name)), NAME)
        draw(opt.load_result(plot_only, name), plot_only.with_suffix(".png"))
        return
    if not set(tokens) <= set(TOKENS):
        raise typer.BadParameter(f"{tokens} are not all among {list(TOKENS)}.", param_hint="--tokens")
    precisions = opt.choose("--precision", precision, PRECISIONS)
    shapes, working_set = opt.parse_shapes(shape), working_set_mib * 2**20
    sample_seconds = SAMPLE_SECONDS
    if quick:
        shapes, working_set, tokens, sample_seconds = [(64, 128)], 2**15, tokens[:2], 1e-4
    schedule = opt.make_rounds(opt.Device.cpu, quick, rounds=rounds, seconds=seconds, warmup=warmup, minimum=9)
    tier = bitmask.tier()
    if tier is None:
        raise typer.BadParameter("The kernels are not compiled here, and nothing can be measured without them.")
    name = next(name for name, of in NAMES.items() if of == tier)
    run = opt.start_run(name, opt.Device.cpu, machine, output_dir, threads, quick)
    result = run.new_result(REFERENCE, tier=tier, r=RANK, seed=seed, working_set_bytes=working_set)
    for (m, n), chosen, pattern in itertools.product(shapes, precisions, sparsity):
        count = max(math.ceil(working_set / (m * n * chosen.dtype.itemsize)), 2)
        torch.manual_seed(seed)
        dense = [prune(torch.randn(m, n).to(chosen.dtype), pattern) for _ in range(count)]
        layers = Layers(dense, tier)
        tasks: dict[str, list[Contestant]] = {
            **{str(number): layers.few_tokens(number) for number in tokens},
            **layers.scaled_weights(),
            "training": layers.training(),
        }
        for task, contestants in tasks.items():
            with torch.inference_mode():
                calls = {one.name: repetitions_for(one.run, run.device, sample_seconds) for one in contestants}
                repetitive = [repeated(one, calls[one.name]) for one in contestants]
                clocks = measure_cpu_time(repetitive, run.device, schedule, seed)
            for clock, samples in zip(("computing", "passed"), clocks, strict=True):
                parameters = {"shape": [m, n], "precision": chosen.name, "sparsity": pattern, "task": task}
                one_call = {name: [time / calls[name] for time in times] for name, times in samples.items()}
                result.cases.append(Case({**parameters, "clock": clock}, one_call, layers.sizes()))
            result.save(run.json_path)
        del dense, layers, tasks
    report(result)
    draw(result, run.picture_path)
    make_console().print(f"Written: {run.json_path}")


def report(result: BenchmarkResult) -> None:
    """Print the cases by the time of computing, as one table."""
    rows = []
    for case in result.cases:
        if case.parameters["clock"] != "computing":
            continue
        m, n = case.parameters["shape"]
        task = case.parameters["task"]
        for name in case.samples:
            rows.append(
                [
                    f"{m}×{n} {case.parameters['precision']} {case.parameters['sparsity']}",
                    TASK_LABELS.get(task, f"{task} tokens"),
                    LABELS[name] if task not in TASK_LABELS or name == "copy" else name,
                    format_seconds(case.summary(name)),
                    format_ratio(case.ratio(name, result.reference)),
                ]
            )
    headings = ["weight", "task", "by", "ms a thread (quartiles)", "× dense (quartiles)"]
    print_table(make_console(), headings, rows, numbers_from=3)


def draw(result: BenchmarkResult, path: Path) -> None:
    """Draw the ratios to `F.linear` over tokens: a row for each dtype and shape, a column for each share of zeros."""
    cases = [
        one for one in result.cases if one.parameters["clock"] == "computing" and one.parameters["task"].isdigit()
    ]
    kinds = list(dict.fromkeys((tuple(one.parameters["shape"]), one.parameters["precision"]) for one in cases))
    patterns = list(dict.fromkeys(one.parameters["sparsity"] for one in cases))
    styles = {
        name: Style(LABELS[name], *style)
        for name, style in STYLES.items()
        if any(name in one.samples for one in cases)
    }
    figure, grid = panels(
        len(kinds),
        len(patterns),
        "Forward pass on a few tokens: time relative to F.linear",
        "Lower is faster; medians, lines from quartile to quartile. Weights come from memory, not from a cache.\n"
        f"{machine_note(result.environment)}",
        share_y=True,
    )
    for row, (shape, precision) in zip(grid, kinds, strict=True):
        row[0].set_ylabel("time ÷ F.linear's")
        for axes, pattern in zip(row, patterns, strict=True):
            chosen = [
                one
                for one in cases
                if (tuple(one.parameters["shape"]), one.parameters["precision"], one.parameters["sparsity"])
                == (shape, precision, pattern)
            ]
            series = {
                name: [one.ratio(name, result.reference) for one in chosen]
                for name in styles
                if all(name in one.samples for one in chosen)
            }
            ratio_lines(axes, [int(one.parameters["task"]) for one in chosen], series, {k: styles[k] for k in series})
            reference_line(axes)
            zeros = pattern if ":" in pattern else f"{float(pattern):.0%} zeros"
            axes.set_title(f"{shape[0]}×{shape[1]}, {PRECISIONS[precision].label}, {zeros}")
    for axes in grid[-1]:
        axes.set_xlabel("tokens")
    add_legend(figure, styles.values(), reference=LABELS[REFERENCE], lines=True, columns=3)
    save_figure(figure, path)


if __name__ == "__main__":
    app()
