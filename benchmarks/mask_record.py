# SPDX-License-Identifier: Apache-2.0
"""
Recording the mask of a weight, next to copying the weight: `python -m benchmarks.mask_record`.

One weight of a Llama-7B (11008×4096, larger than the caches), random and half zero, in each dtype, stored as
`nn.Linear` stores it and transposed, as `Conv1D` does. An adapter's record holds one mask for each adapted layer, so
the time for the 6.48 billion weights of the linear layers of all blocks of Llama-7B follows from that of one.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

import torch
import typer

from peft_spp.sparsity import record_mask

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
)
from .harness.options import (
    DEFAULT_OUTPUT,
    Device,
    DeviceOption,
    MachineOption,
    OutputOption,
    QuickOption,
    SeedOption,
    ThreadsOption,
    parse_shapes,
    start_run,
)


NAME = "mask_record"
REFERENCE = "copy"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = {"linear": "`nn.Linear`", "conv1d": "`Conv1D`"}
# 32 blocks of four 4096×4096 weights and three of 4096×11008
LLAMA_7B = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)

app = typer.Typer(add_completion=False)


@app.command()
def main(
    shape: Annotated[str, typer.Option(help="Outputs and inputs of the weight.")] = "11008x4096",
    rounds: Annotated[int, typer.Option(min=1, help="How many times each is measured.")] = 9,
    device: DeviceOption = Device.cpu,
    machine: MachineOption = None,
    output_dir: OutputOption = DEFAULT_OUTPUT,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    quick: QuickOption = False,
) -> None:
    """Time the recording of one weight's mask, by dtype and layout."""
    (size,) = parse_shapes(["30x70" if quick else shape])
    run = start_run(NAME, device, machine, output_dir, threads, quick)
    result = run.new_result(REFERENCE, shape=size, weights_of_llama_7b=LLAMA_7B, seed=seed)
    for dtype in DTYPES:
        for layout in LAYOUTS:
            result.cases.append(measure(size, dtype, layout, run.device, 2 if quick else rounds, seed))
    result.save(run.json_path)
    report(result)
    make_console().print(f"Written: {run.json_path}")


def measure(size: tuple[int, int], dtype: str, layout: str, device: torch.device, rounds: int, seed: int) -> Case:
    """
    Record and copy one weight in turns.

    Args:
        size (`tuple[int, int]`): Outputs and inputs.
        dtype (`str`): One of `DTYPES`.
        layout (`str`): One of `LAYOUTS`.
        device (`torch.device`): Where the weight is.
        rounds (`int`): How many times each is measured.
        seed (`int`): Seed of the weight.

    Returns:
        `Case`: The times, and what follows for Llama-7B.
    """
    outputs, inputs = size
    torch.manual_seed(seed)
    stored = torch.randn(size if layout == "linear" else (inputs, outputs))
    weight = torch.where(torch.rand_like(stored) < 0.5, 0.0, stored).to(device, DTYPES[dtype])
    weight = weight if layout == "linear" else weight.t()
    copy = torch.empty_like(weight)
    contestants = [Contestant("record", partial(record_mask, weight)), Contestant("copy", partial(copy.copy_, weight))]
    case = Case({"dtype": dtype, "layout": layout})
    case.samples = measure_interleaved(contestants, device, Rounds(exact=rounds), seed)
    seconds = case.summary("record").median
    case.values["record"] = {
        "gb_per_second": weight.numel() * weight.element_size() / seconds / 1e9,
        "seconds_llama_7b": seconds / weight.numel() * LLAMA_7B,
    }
    return case


def report(result: BenchmarkResult) -> None:
    """Print the result as a table."""
    rows = []
    for case in result.cases:
        values = case.values["record"]
        rows.append(
            [
                case.parameters["dtype"],
                LAYOUTS[case.parameters["layout"]],
                format_seconds(case.summary("record")),
                f"{values['gb_per_second']:.1f}",
                format_ratio(case.ratio("record", result.reference)),
                f"{values['seconds_llama_7b']:.2f}",
            ]
        )
    headings = ["", "stored as", "ms (quartiles)", "GB/s", "× copy (quartiles)", "s for Llama-7B"]
    print_table(make_console(), headings, rows, numbers_from=2)


if __name__ == "__main__":
    app()
