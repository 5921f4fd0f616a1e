# SPDX-License-Identifier: Apache-2.0
"""
Linear layers packed as 2:4 next to dense ones on a CUDA device: `python -m benchmarks.semi_structured`.

This is what `peft_spp.inference.to_semi_structured` does to a merged model. Contestants are the dense layer and the
packed one, for several numbers of tokens: few, as in decoding, and many, as in prefill.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from torch import nn

from peft_spp.inference.semi_structured import MINIMUM_CAPABILITY, pack
from peft_spp.pruning import prune_magnitude

from .harness import (
    BenchmarkResult,
    Case,
    Contestant,
    Rounds,
    format_ratio,
    make_console,
    measure_interleaved,
    print_table,
)
from .harness import options as opt


NAME = "semi_structured"
DENSE = "dense"
PACKED = "packed"
SHAPES = ["1024x4096", "4096x4096", "14336x4096", "4096x14336"]
TOKENS = [1, 16, 64, 256, 1024, 4096, 16384]
# one call is too short for the clock
CALLS = 20

app = typer.Typer(add_completion=False)


@app.command()
def main(
    shape: opt.ShapeOption = SHAPES,
    tokens: Annotated[list[int], typer.Option(min=1, help="Tokens in a forward pass. May be repeated.")] = TOKENS,
    rounds: opt.RoundsOption = None,
    seconds: opt.SecondsOption = 2.0,
    warmup: opt.WarmupOption = None,
    seed: opt.SeedOption = 0,
    machine: opt.MachineOption = None,
    output_dir: opt.OutputOption = opt.DEFAULT_OUTPUT,
    quick: opt.QuickOption = False,
) -> None:
    """Time linear layers whose 2:4 weights are packed, next to the same layers with dense weights."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < MINIMUM_CAPABILITY:
        raise typer.BadParameter("This benchmark needs a CUDA device of compute capability 8.0 or more.")
    device = opt.Device.cuda
    schedule = opt.make_rounds(device, quick, rounds=rounds, seconds=seconds, warmup=warmup, minimum=10)
    run = opt.start_run(NAME, device, machine, output_dir, None, quick)
    result = run.new_result(DENSE, calls=CALLS, dtype="bfloat16", seed=seed)
    console = make_console()
    for m, n in [(128, 128)] if quick else opt.parse_shapes(shape):
        for count in [16] if quick else tokens:
            result.cases.append(measure(m, n, count, run.device, schedule, seed))
            result.save(run.json_path)
            console.print(f"{m}x{n}, {count} tokens")
    report(result)
    console.print(f"Written: {run.json_path}")


@torch.no_grad()
def measure(m: int, n: int, tokens: int, device: torch.device, schedule: Rounds, seed: int) -> Case:
    """
    Time one shape and number of tokens.

    Args:
        m (`int`): The rows of the weight.
        n (`int`): Its columns.
        tokens (`int`): The rows of the input.
        device (`torch.device`): A CUDA device.
        schedule (`Rounds`): How many rounds.
        seed (`int`): Seed of the weight, the input and the order in each round.

    Returns:
        `Case`: Seconds of one call; the values are the bytes of the weight.
    """
    torch.manual_seed(seed)
    layer = nn.Linear(n, m, bias=False, dtype=torch.bfloat16, device=device)
    prune_magnitude(layer, pattern="2:4", target_modules=".*")
    weight, inputs = layer.weight.detach(), torch.randn(tokens, n, dtype=torch.bfloat16, device=device)
    packed = pack(weight)
    torch.testing.assert_close(
        nn.functional.linear(inputs, packed), nn.functional.linear(inputs, weight), rtol=2e-2, atol=1e-2 * n**0.5
    )

    def calls_with(one: torch.Tensor) -> None:
        for _ in range(CALLS):
            nn.functional.linear(inputs, one)

    contestants = [Contestant(DENSE, lambda: calls_with(weight)), Contestant(PACKED, lambda: calls_with(packed))]
    samples = measure_interleaved(contestants, device, schedule, seed)
    case = Case({"shape": [m, n], "tokens": tokens})
    case.samples = {name: [total / CALLS for total in totals] for name, totals in samples.items()}
    case.values = {DENSE: {"bytes": float(weight.nbytes)}, PACKED: {"bytes": weight.nbytes * 9 / 16}}
    return case


def report(result: BenchmarkResult) -> None:
    """Print all cases as one table."""
    rows = []
    for case in result.cases:
        m, n = case.parameters["shape"]
        dense, packed = case.summary(DENSE), case.summary(PACKED)
        times = [f"{one.median * 1e6:.1f}" for one in (dense, packed)]
        rows.append([f"{m}×{n}", str(case.parameters["tokens"]), *times, format_ratio(case.ratio(PACKED, DENSE))])
    headings = ["m×n", "tokens", "dense, µs", "packed, µs", "packed / dense (quartiles)"]
    print_table(make_console(), headings, rows, numbers_from=1)


if __name__ == "__main__":
    app()
