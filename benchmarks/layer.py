# SPDX-License-Identifier: Apache-2.0
"""
Forward and backward pass of one adapted linear layer: `python -m benchmarks.layer`.

Every contestant gets the same frozen 2:4 weight W (m, n), the same input x, which needs a gradient, and the same
gradient gy of the output. Gradients are cleared before every call, outside the timed span.

`matmuls` is the floor for a method whose weight depends on its parameters: the three products x Wᵀ, gy W and gyᵀ x,
each into fresh memory that is freed before the next. What SPP takes beyond it is its elementwise work.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    format_ratio,
    format_seconds,
    make_console,
    measure_interleaved,
    print_table,
    summarize,
)
from .harness import options as opt
from .harness.plots import Style, add_legend, grouped_bars, machine_note, panels, reference_line, save_figure
from .models import PRECISIONS, LinearStack, Precision, build_linear_stack, copy_with_shared_weights


NAME = "layer"
LONG_NAME = "layer_long"
REFERENCE = "lora"
MATMULS = "matmuls"
MATMULS_STYLE = Style("Three matmuls only", "#bbbbbb", "_")
SHAPES = ["2048x2048", "11008x4096", "4096x11008"]
# with 8192 tokens a round of all competitors takes minutes on a few cores
TOKENS = {opt.Device.cpu: [512, 2048], opt.Device.cuda: [512, 2048, 8192]}
LONG_TOKENS = 8192
MAIN_PRECISIONS = ["fp32", "bf16"]
MAIN_COMPETITORS = ["base", "ia3", "lora", "hira", "masked_lora", "spp_authors_repeat", "spp_authors_loop", "spp"]
LONG_COMPETITORS = ["base", "lora", "spp"]

app = typer.Typer(add_completion=False)


@app.command()
def main(
    shape: opt.ShapeOption = SHAPES,
    tokens: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Rows of x. May be repeated; by default 512 and 2048, on CUDA also 8192."),
    ] = None,
    precision: opt.PrecisionOption = MAIN_PRECISIONS,
    competitor: Annotated[
        list[str] | None,
        typer.Option(help="What to compare, by the names in benchmarks/competitors. May be repeated."),
    ] = None,
    long: Annotated[
        bool, typer.Option("--long", help="Only 8192 tokens and few competitors, into a result of its own.")
    ] = False,
    device: opt.DeviceOption = opt.Device.cpu,
    rounds: opt.RoundsOption = None,
    seconds: opt.SecondsOption = 40.0,
    warmup: opt.WarmupOption = None,
    threads: opt.ThreadsOption = None,
    seed: opt.SeedOption = 0,
    machine: opt.MachineOption = None,
    output_dir: opt.OutputOption = opt.DEFAULT_OUTPUT,
    quick: opt.QuickOption = False,
    plot_only: opt.PlotOnlyOption = None,
) -> None:
    """Time forward and backward pass of one adapted linear layer."""
    name, all_competitors = (LONG_NAME, LONG_COMPETITORS) if long else (NAME, MAIN_COMPETITORS)
    if plot_only is not None:
        draw(opt.load_result(plot_only, name), plot_only.with_suffix(".png"))
        return
    competitors = opt.choose("--competitor", competitor or all_competitors, COMPETITORS, required=REFERENCE)
    precisions = opt.choose("--precision", precision, PRECISIONS)
    shapes = opt.parse_shapes(shape)
    token_counts = list(dict.fromkeys(tokens or ([LONG_TOKENS] if long else TOKENS[device])))
    if quick:
        shapes, token_counts = [(32, 16)], [8]
    schedule = opt.make_rounds(device, quick, rounds=rounds, seconds=seconds, warmup=warmup, minimum=3)
    run = opt.start_run(name, device, machine, output_dir, threads, quick)

    console = make_console()
    result = run.new_result(
        REFERENCE, competitors=[c.name for c in competitors], weights="random, pruned to 2:4", seed=seed
    )
    for m, n in shapes:
        for chosen in precisions:
            base = build_linear_stack(m, n, 1, chosen.dtype, run.device, seed)
            for count in token_counts:
                contestants = make_contestants(competitors, base, count, chosen, run.device)
                samples = measure_interleaved(contestants, run.device, schedule, seed)
                case = Case({"shape": [m, n], "tokens": count, "precision": chosen.name}, samples)
                if "spp" in samples:
                    case.values["spp"] = {"share_beyond_matmuls": share_beyond_matmuls(samples)}
                result.cases.append(case)
                result.save(run.json_path)
                console.print(f"{m}x{n}, {count} tokens, {chosen.name}; rounds: {len(samples[MATMULS])}")
    report(result)
    draw(result, run.picture_path)
    console.print(f"Written: {run.json_path} and {run.picture_path}")


def make_contestants(
    competitors: Sequence[Competitor], base: LinearStack, tokens: int, precision: Precision, device: torch.device
) -> list[Contestant]:
    """
    The contestants of one case.

    Args:
        competitors (`Sequence[Competitor]`): The methods.
        base (`LinearStack`): Of one layer; its weight is shared by all contestants.
        tokens (`int`): The rows of the input.
        precision (`Precision`): The dtype of the input, and whether autocast is on.
        device (`torch.device`): Where the weight is.

    Returns:
        `list[Contestant]`: One for each competitor, and `matmuls`.
    """
    weight = base.weight
    x = torch.randn(1, tokens, weight.shape[1], dtype=precision.dtype, device=device, requires_grad=True)
    grad_y = torch.randn(1, tokens, weight.shape[0], dtype=precision.dtype, device=device)
    contestants = [Contestant(MATMULS, lambda: three_matmuls(x.detach()[0], grad_y[0], weight))]
    for competitor in competitors:
        stack = copy_with_shared_weights(base)
        # PEFT's wrapper around the model would count in full for this one layer
        competitor.adapt(stack)
        contestants.append(_layer_contestant(competitor.name, stack.linears()[0], x, grad_y, precision))
    return contestants


def _layer_contestant(
    name: str, layer: nn.Module, x: torch.Tensor, grad_y: torch.Tensor, precision: Precision
) -> Contestant:
    def clear_gradients() -> None:
        for tensor in (x, *layer.parameters()):
            tensor.grad = None

    def forward_and_backward() -> None:
        with precision.context(x.device):
            y = layer(x)
        y.backward(grad_y)

    return Contestant(name, forward_and_backward, clear_gradients)


@torch.no_grad()
def three_matmuls(x: torch.Tensor, grad_y: torch.Tensor, weight: torch.Tensor) -> None:
    """x Wᵀ, gy W and gyᵀ x, one after another and none kept."""
    torch.mm(x, weight.t())
    torch.mm(grad_y, weight)
    torch.mm(grad_y.t(), x)


def share_beyond_matmuls(samples: dict[str, list[float]]) -> float:
    """The median share of SPP's time that is beyond the three matmuls of the same round."""
    return summarize([1 - floor / own for own, floor in zip(samples["spp"], samples[MATMULS], strict=True)]).median


def report(result: BenchmarkResult) -> None:
    """Print all cases as one table."""
    headings = ["m×n", "tokens", "precision", "method", "rounds", "ms, median (quartiles)", "× LoRA (quartiles)"]
    rows = []
    for case in result.cases:
        (m, n), tokens = case.parameters["shape"], case.parameters["tokens"]
        for name, samples in case.samples.items():
            label = MATMULS_STYLE.label if name == MATMULS else COMPETITORS[name].style.label
            if "share_beyond_matmuls" in case.values.get(name, {}):
                label += f", {case.values[name]['share_beyond_matmuls']:.0%} beyond the matmuls"
            time, ratio = format_seconds(case.summary(name)), format_ratio(case.ratio(name, result.reference))
            rows.append([f"{m}×{n}", str(tokens), case.parameters["precision"], label, str(len(samples)), time, ratio])
    print_table(make_console(), headings, rows, numbers_from=4)


def draw(result: BenchmarkResult, path: Path) -> None:
    """Draw the ratios to LoRA: a row of panels for each precision, a column for each shape."""
    shapes = list(dict.fromkeys(tuple(case.parameters["shape"]) for case in result.cases))
    precisions = list(dict.fromkeys(case.parameters["precision"] for case in result.cases))
    styles = {MATMULS: MATMULS_STYLE, **styles_of(result.settings["competitors"])}
    del styles[result.reference]
    figure, grid = panels(
        len(precisions),
        len(shapes),
        "One adapted linear layer, forward and backward: time relative to LoRA",
        f"Lower is faster; medians, lines from quartile to quartile.\n{machine_note(result.environment)}",
        share_y=True,
    )
    for row, precision in zip(grid, precisions, strict=True):
        row[0].set_ylabel("time ÷ LoRA's time")
        for axes, shape in zip(row, shapes, strict=True):
            cases = [
                case
                for case in result.cases
                if (tuple(case.parameters["shape"]), case.parameters["precision"]) == (shape, precision)
            ]
            groups = [f"{case.parameters['tokens']} tokens" for case in cases]
            series = {name: [case.ratio(name, result.reference) for case in cases] for name in styles}
            grouped_bars(axes, groups, series, styles, value_labels_of=["spp"])
            reference_line(axes)
            axes.set_title(f"W {shape[0]}×{shape[1]}, {PRECISIONS[precision].label}")
    add_legend(figure, styles.values(), reference="LoRA")
    save_figure(figure, path)


if __name__ == "__main__":
    app()
