# SPDX-License-Identifier: Apache-2.0
"""
The memory of a training step: `python -m benchmarks.memory`.

The step and the model are those of `training_step`. For every competitor, after a first step that creates the state of
the optimizer:

- `static_bytes`: what stays between steps: parameters, buffers (masks among them) and the state of AdamW.
- `saved_bytes`: what operations save for the backward pass, as distinct storages, seen by
  `torch.autograd.graph.saved_tensors_hooks` during the forward pass. Parameters and buffers do not count. With
  gradient checkpointing these are the inputs of the blocks.
- `kept_bytes`: how much more memory is taken after the forward pass than before it, by the allocator's account. It
  has the saved tensors and all else that lives on, such as the loss.
- `peak_bytes`: the most memory during a step: `static_bytes` and the highest level of the step above that before it.

`benchmarks.harness.memory` tells how the allocator's account is read. These are exact numbers, not samples: each
competitor runs alone and a repeated run gives the same.
"""

from __future__ import annotations

import gc
from pathlib import Path

import torch
import typer
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from .competitors import COMPETITORS
from .harness import BenchmarkResult, Case, format_bytes, make_console, print_table
from .harness import options as opt
from .harness.memory import record_saved_tensors, storage_bytes, trace_memory
from .harness.plots import BLUE, GRAY, VERMILLION, machine_note, panels, save_figure
from .models import PRECISIONS, build_llama
from .training import MAIN_COMPETITORS, MAIN_PRECISIONS, TrainingStep, choose_size, title_of


NAME = "memory"
REFERENCE = "lora"
GIBIBYTE = 2**30

app = typer.Typer(add_completion=False)


@app.command()
def main(
    precision: opt.PrecisionOption = MAIN_PRECISIONS,
    checkpointing: opt.CheckpointingOption = opt.Checkpointing.both,
    competitor: opt.DeviceCompetitorOption = None,
    batch: opt.BatchOption = None,
    sequence: opt.SequenceOption = None,
    device: opt.DeviceOption = opt.Device.cpu,
    threads: opt.ThreadsOption = None,
    seed: opt.SeedOption = 0,
    machine: opt.MachineOption = None,
    output_dir: opt.OutputOption = opt.DEFAULT_OUTPUT,
    quick: opt.QuickOption = False,
    plot_only: opt.PlotOnlyOption = None,
) -> None:
    """Measure what a training step keeps for its backward pass, and its peak."""
    if plot_only is not None:
        draw(opt.load_result(plot_only, NAME), plot_only.with_suffix(".png"))
        return
    competitors = opt.choose("--competitor", competitor or MAIN_COMPETITORS[device], COMPETITORS, required=REFERENCE)
    precisions = opt.choose("--precision", precision, PRECISIONS)
    size = choose_size(device, quick, batch, sequence)
    run = opt.start_run(NAME, device, machine, output_dir, threads, quick)

    console = make_console()
    result = run.new_result(
        REFERENCE, competitors=[c.name for c in competitors], weights="random, pruned to 2:4", seed=seed
    )
    for chosen in precisions:
        base = build_llama(size.config(), chosen.dtype, run.device, seed)
        result.settings["size"] = size.describe(base)
        cases = {
            enabled: Case({"precision": chosen.name, "checkpointing": enabled}) for enabled in checkpointing.values()
        }
        result.cases.extend(cases.values())
        for one in competitors:
            step = TrainingStep(one, base, size, chosen, seed)
            for enabled, case in cases.items():
                step.set_checkpointing(enabled)
                case.values[one.name] = measure_or_tell(step)
            del step
            result.save(run.json_path)
            console.print(f"{chosen.name}: {one.style.label}")
        del base
    report(result)
    draw(result, run.picture_path)
    console.print(f"Written: {run.json_path} and {run.picture_path}")


def measure_or_tell(step: TrainingStep) -> dict[str, float]:
    """The memory of a step, or that the GPU has too little for it."""
    try:
        return measure(step)
    except torch.OutOfMemoryError:
        values = {"out_of_memory": 1.0}
    # what the failed step had allocated is only free once the exception is gone
    step.drop_gradients()
    gc.collect()
    torch.cuda.empty_cache()
    return values


def measure(step: TrainingStep) -> dict[str, float]:
    """
    The memory of a training step.

    Args:
        step (`TrainingStep`): The step; it is run three times, once only forward.

    Returns:
        `dict[str, float]`: The four numbers of bytes above, and `trainable_parameters`.
    """
    step()
    model_tensors = [*step.model.parameters(), *step.model.buffers()]
    static = storage_bytes([*model_tensors, *step.optimizer_state()])

    with record_saved_tensors(model_tensors) as saved:
        loss = step.forward()
        saved_bytes = saved.total
    del loss
    forward = trace_memory(step.forward, step.device)
    kept_bytes = forward.end
    del forward
    whole = trace_memory(step, step.device)
    return {
        "trainable_parameters": sum(parameter.numel() for parameter in step.trained),
        "static_bytes": static,
        "saved_bytes": saved_bytes,
        "kept_bytes": kept_bytes,
        "peak_bytes": static + whole.peak,
    }


def report(result: BenchmarkResult) -> None:
    """Print all cases as one table."""
    headings = ["precision", "checkpointing", "method", "trained", "static", "saved", "kept", "peak", "peak ÷ LoRA's"]
    rows = []
    for case in result.cases:
        checkpointing = "on" if case.parameters["checkpointing"] else "off"
        reference = case.values[result.reference].get("peak_bytes")
        for name, values in case.values.items():
            row = [case.parameters["precision"], checkpointing, COMPETITORS[name].style.label]
            if "out_of_memory" in values:
                rows.append([*row, "out of memory", "", "", "", "", ""])
                continue
            sizes = [format_bytes(values[f"{key}_bytes"]) for key in ("static", "saved", "kept", "peak")]
            ratio = "" if reference is None else f"{values['peak_bytes'] / reference:.2f}"
            rows.append([*row, f"{values['trainable_parameters'] / 1e6:.3f} M", *sizes, ratio])
    print_table(make_console(), headings, rows, numbers_from=3)


def draw(result: BenchmarkResult, path: Path) -> None:
    """Draw peaks as bars: a row of panels for each precision, a column for gradient checkpointing off and on."""
    precisions = list(dict.fromkeys(case.parameters["precision"] for case in result.cases))
    settings = list(dict.fromkeys(case.parameters["checkpointing"] for case in result.cases))
    figure, grid = panels(
        len(precisions),
        len(settings),
        "Peak memory of one training step",
        f"{title_of(result.settings)}, AdamW. Lower is better; the number is the peak.\n"
        f"{machine_note(result.environment)}",
        panel_height=0.3 + 0.21 * len(result.settings["competitors"]),
        share_x=True,
        share_y=True,
    )
    for case in result.cases:
        precision, checkpointing = case.parameters["precision"], case.parameters["checkpointing"]
        axes = grid[precisions.index(precision)][settings.index(checkpointing)]
        _draw_case(axes, case)
        axes.set_title(f"{PRECISIONS[precision].label}, checkpointing {'on' if checkpointing else 'off'}")
    for axes in grid[-1]:
        axes.set_xlabel("GiB")
    handles = [
        Patch(facecolor=GRAY, label="parameters, masks, optimizer"),
        Patch(facecolor=BLUE, label="the step at its highest"),
        Line2D([], [], color=VERMILLION, marker="D", linestyle="none", label="of that, saved for backward"),
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False)
    save_figure(figure, path)


def _draw_case(axes: Axes, case: Case) -> None:
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_yticks(range(len(case.values)), [COMPETITORS[name].style.label for name in case.values])
    axes.set_ylim(len(case.values) - 0.5, -0.5)
    for place, values in enumerate(case.values.values()):
        if "out_of_memory" in values:
            axes.annotate("out of memory", (0, place), xytext=(3, 0), textcoords="offset points", va="center")
            continue
        static, saved, peak = (values[f"{key}_bytes"] / GIBIBYTE for key in ("static", "saved", "peak"))
        axes.barh(place, static, 0.7, color=GRAY)
        axes.barh(place, peak - static, 0.7, left=static, color=BLUE)
        axes.plot(static + saved, place, marker="D", markersize=4, color=VERMILLION, markeredgecolor="white")
        axes.annotate(
            f"{peak:.2f}", (peak, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7.5
        )
    axes.margins(x=0.12)


if __name__ == "__main__":
    app()
