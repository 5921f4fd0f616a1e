# SPDX-License-Identifier: Apache-2.0
"""
The passes over a weight that SPP makes besides the three matmuls, on CPU: `python -m benchmarks.passes`.

Making W' reads W once and writes W' once; the sums for the gradients of A and B read W and gyᵀx once. Both move as
many bytes as copying W does, so the copy, which is `torch.Tensor.copy_`, is the floor for either. Each is timed after
the matmul that comes before it in a training step and fills the caches with its own data, into memory that is there
already. (`benchmarks.kernels_gpu` measures the Triton kernels.)
"""

from __future__ import annotations

from functools import partial

import torch
import typer

from peft_spp.functional.factors import Factors
from peft_spp.functional.kernels.cpu.backend import cpu
from peft_spp.functional.kernels.scaled import ScaledWeight

from .harness import (
    BenchmarkResult,
    Case,
    Contestant,
    format_ratio,
    format_seconds,
    make_console,
    measure_interleaved,
    print_table,
)
from .harness import options as opt
from .layer import MAIN_PRECISIONS, SHAPES
from .models import PRECISIONS, build_linear_stack


NAME = "passes"
REFERENCE = "copy"
LABELS = {"copy": "copy of W", "scaled_weight": "W'", "factor_gradients": "sums for the gradients"}
RANK = 16

app = typer.Typer(add_completion=False)


@app.command()
def main(
    shape: opt.ShapeOption = SHAPES,
    precision: opt.PrecisionOption = MAIN_PRECISIONS,
    rounds: opt.RoundsOption = None,
    seconds: opt.SecondsOption = 10.0,
    warmup: opt.WarmupOption = None,
    threads: opt.ThreadsOption = None,
    seed: opt.SeedOption = 0,
    machine: opt.MachineOption = None,
    output_dir: opt.OutputOption = opt.DEFAULT_OUTPUT,
    quick: opt.QuickOption = False,
) -> None:
    """Time the passes over one weight next to copying it."""
    precisions = opt.choose("--precision", precision, PRECISIONS)
    shapes = [(32, 16)] if quick else opt.parse_shapes(shape)
    tokens = 8 if quick else 512
    schedule = opt.make_rounds(opt.Device.cpu, quick, rounds=rounds, seconds=seconds, warmup=warmup, minimum=5)
    run = opt.start_run(NAME, opt.Device.cpu, machine, output_dir, threads, quick)
    result = run.new_result(REFERENCE, tokens=tokens, r=RANK, seed=seed)
    for m, n in shapes:
        for chosen in precisions:
            contestants = make_contestants(m, n, tokens, chosen.dtype, seed)
            samples = measure_interleaved(contestants, run.device, schedule, seed)
            case = Case({"shape": [m, n], "precision": chosen.name}, samples)
            moved = 2 * m * n * chosen.dtype.itemsize
            for name in samples:
                case.values[name] = {"gb_per_second": moved / case.summary(name).median / 1e9}
            result.cases.append(case)
    result.save(run.json_path)
    report(result)
    make_console().print(f"Written: {run.json_path}")


def make_contestants(m: int, n: int, tokens: int, dtype: torch.dtype, seed: int) -> list[Contestant]:
    """
    The passes, each prepared by the matmul that comes before it.

    Args:
        m (`int`): Outputs of the weight.
        n (`int`): Its inputs.
        tokens (`int`): The rows of x.
        dtype (`torch.dtype`): Of the weight, of x and of gy.
        seed (`int`): Seed of the weight.

    Returns:
        `list[Contestant]`: Copying W, making W', and the sums for the gradients of A and B.
    """
    weight = build_linear_stack(m, n, 1, dtype, torch.device("cpu"), seed).weight
    x, grad_y = (torch.randn(tokens, size, dtype=dtype) for size in (n, m))
    factors = [Factors(torch.randn(RANK, n), torch.randn(m, 1), 2.0)]
    scaled, product = torch.zeros_like(weight), torch.zeros_like(weight)
    w = ScaledWeight(weight, factors, True, dtype)
    before_scaling = partial(torch.mm, grad_y, scaled)
    return [
        Contestant("copy", partial(scaled.copy_, weight), before_scaling),
        Contestant("scaled_weight", partial(cpu.scaled_weight, w, scaled), before_scaling),
        Contestant(
            "factor_gradients",
            partial(cpu.factor_gradients, product, weight, factors),
            partial(torch.mm, grad_y.t(), x, out=product),
        ),
    ]


def report(result: BenchmarkResult) -> None:
    """Print the result as a table."""
    rows = []
    for case in result.cases:
        m, n = case.parameters["shape"]
        for name in case.samples:
            ratio = format_ratio(case.ratio(name, result.reference))
            time, speed = format_seconds(case.summary(name)), f"{case.values[name]['gb_per_second']:.1f}"
            rows.append([f"{m}×{n}", case.parameters["precision"], LABELS[name], time, speed, ratio])
    print_table(
        make_console(),
        ["m×n", "precision", "pass", "ms (quartiles)", "GB/s", "× copy (quartiles)"],
        rows,
        numbers_from=3,
    )


if __name__ == "__main__":
    app()
