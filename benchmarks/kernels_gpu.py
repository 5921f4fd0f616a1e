# SPDX-License-Identifier: Apache-2.0
"""
The Triton kernels next to PyTorch's own on a CUDA device: `python -m benchmarks.kernels_gpu`.

Both passes, `scaled_weight` and `factor_gradients`, are bound by memory, so the measure is the bytes that a pass
cannot do without (each input read once, each result written once) over its time, and the reference is a plain copy in
the same rounds. `composite` is the same formula in PyTorch's operations, `compiled` is `torch.compile` of it.

The calls are captured in CUDA graphs, so that the time is that of the GPU: a graph makes many calls, each on inputs
and into results of its own that together are far larger than the second-level cache. What a call takes on the host is
measured apart, without a graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import typer

from peft_spp.functional import Factors
from peft_spp.functional.kernels.composite import composite
from peft_spp.functional.kernels.scaled import ScaledWeight
from peft_spp.functional.kernels.triton import is_available, triton

from .harness import (
    BenchmarkResult,
    Case,
    Contestant,
    Rounds,
    make_console,
    measure_interleaved,
    print_table,
)
from .harness import options as opt


NAME = "kernels_gpu"
COPY = "copy"
RANK = 16
SHAPES = ["1024x4096", "4096x4096", "14336x4096", "4096x14336", "28672x8192"]
DTYPES = [torch.bfloat16, torch.float32]
PASSES = ["scaled_weight", "factor_gradients"]

# of the inputs that a graph goes through before it comes back to the first: ten times the cache of an H100
WORKING_SET_BYTES = 512 << 20
# times that a graph goes through them: milliseconds in all, next to some microseconds for its launch
TURNS = 16
HOST_CALLS = 50

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Inputs:
    """What one call works on."""

    product: torch.Tensor
    weight: torch.Tensor
    factors: Sequence[Factors]


@app.command()
def main(
    shape: opt.ShapeOption = SHAPES,
    rounds: opt.RoundsOption = None,
    seconds: opt.SecondsOption = 5.0,
    warmup: opt.WarmupOption = None,
    seed: opt.SeedOption = 0,
    machine: opt.MachineOption = None,
    output_dir: opt.OutputOption = opt.DEFAULT_OUTPUT,
    quick: opt.QuickOption = False,
) -> None:
    """Time the Triton kernels on a CUDA device, next to PyTorch's operations and a copy of as many bytes."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("This benchmark needs a CUDA device, and PyTorch finds none here.")
    if not is_available():
        raise typer.BadParameter("This benchmark needs Triton 3.3 or newer. Install it with: pip install triton")
    shapes = [(64, 96)] if quick else opt.parse_shapes(shape)
    working_set = 1 << 16 if quick else WORKING_SET_BYTES
    device = opt.Device.cuda
    schedule = opt.make_rounds(device, quick, rounds=rounds, seconds=seconds, warmup=warmup, minimum=10)
    run = opt.start_run(NAME, device, machine, output_dir, None, quick)

    console = make_console()
    result = run.new_result(COPY, rank=RANK, factors="float32", working_set_bytes=working_set, seed=seed)
    for m, n in shapes:
        for dtype in DTYPES:
            for name in PASSES:
                torch.manual_seed(seed)
                torch.compiler.reset()
                result.cases.append(measure(name, m, n, dtype, run.device, working_set, schedule, seed))
                result.save(run.json_path)
                console.print(f"{name}, {m}x{n}, {_name_of(dtype)}")
    report(result)
    console.print(f"Written: {run.json_path}")


@torch.no_grad()
def measure(
    name: str,
    m: int,
    n: int,
    dtype: torch.dtype,
    device: torch.device,
    working_set: int,
    schedule: Rounds,
    seed: int,
) -> Case:
    """
    Time one pass over weights of one shape and dtype.

    Args:
        name (`str`): `"scaled_weight"` or `"factor_gradients"`.
        m (`int`): The rows of the weight.
        n (`int`): Its columns.
        dtype (`torch.dtype`): That of the weight, of W' and of gyᵀ x; the factors are float32.
        device (`torch.device`): A CUDA device.
        working_set (`int`): The bytes that the inputs of all calls come to.
        schedule (`Rounds`): How many rounds.
        seed (`int`): Seed of the order in each round.

    Returns:
        `Case`: Seconds of one call; the values are the bytes of a call and its seconds on the host.
    """
    sets = -(-working_set // (m * n * dtype.itemsize))
    inputs = [make_inputs(m, n, dtype, device) for _ in range(sets)]
    calls = {
        "triton": call_of(name, getattr(triton, name)),
        "composite": call_of(name, getattr(composite, name)),
        "compiled": call_of(name, torch.compile(getattr(composite, name), dynamic=False)),
    }
    check_agreement(calls, inputs[0])

    case = Case({"pass": name, "shape": [m, n], "dtype": _name_of(dtype)})
    case.values = {call: {"host_seconds": host_seconds(run, inputs[0])} for call, run in calls.items()}
    case.values[COPY] = {"bytes": 2.0 * m * n * dtype.itemsize}
    for call in calls:
        case.values[call]["bytes"] = float(bytes_of_call(name, inputs[0]))
    calls[COPY] = lambda one: one.weight.clone()
    contestants = [Contestant(call, capture(run, inputs)) for call, run in calls.items()]
    samples = measure_interleaved(contestants, device, schedule, seed)
    case.samples = {call: [total / (TURNS * sets) for total in totals] for call, totals in samples.items()}
    return case


def make_inputs(m: int, n: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Random inputs of one call; half of the weight is zero."""
    weight = torch.randn(m, n, device=device, dtype=dtype)
    weight.masked_fill_(torch.rand(m, n, device=device) < 0.5, 0.0)
    factors = Factors(torch.randn(RANK, n, device=device), torch.randn(m, 1, device=device), 2.0)
    return Inputs(torch.randn(m, n, device=device, dtype=dtype), weight, [factors])


def call_of(name: str, function: Callable[..., Any]) -> Callable[[Inputs], Any]:
    """The call of a backend's function for a set of inputs."""
    if name == "scaled_weight":
        return lambda one: function(ScaledWeight(one.weight, one.factors, True, one.weight.dtype))
    return lambda one: function(one.product, one.weight, one.factors)


def bytes_of_call(name: str, one: Inputs) -> int:
    """What a call must read and write: two tensors of the weight's size, and the factors once or twice."""
    factors = sum(tensor.nbytes for f in one.factors for tensor in f[:2])
    return 2 * one.weight.nbytes + (factors if name == "scaled_weight" else 2 * factors)


def check_agreement(calls: dict[str, Callable[[Inputs], Any]], one: Inputs) -> None:
    """Raise an `AssertionError` unless all calls give the same result, but for rounding."""
    expected = calls["composite"](one)
    size = one.weight.shape[0] + one.weight.shape[1]
    for call in calls.values():
        # sums over rows and columns, in different orders
        torch.testing.assert_close(call(one), expected, rtol=2e-2, atol=1e-4 * size)


def host_seconds(call: Callable[[Inputs], Any], one: Inputs) -> float:
    """The mean time that a call takes on the host, the GPU running behind it."""
    for _ in range(3):
        call(one)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(HOST_CALLS):
        call(one)
    seconds = (time.perf_counter() - begin) / HOST_CALLS
    torch.cuda.synchronize()
    return seconds


def capture(call: Callable[[Inputs], Any], inputs: Sequence[Inputs]) -> Callable[[], None]:
    """A CUDA graph that makes the call for all inputs, `TURNS` times over."""
    # compiles what is not compiled, and makes the libraries' workspaces
    for one in inputs[:2]:
        call(one)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(TURNS):
            # kept until the end of the turn, so that no call writes where the one before it did
            results = [call(one) for one in inputs]
            del results
    return graph.replay


def report(result: BenchmarkResult) -> None:
    """Print all cases as one table."""
    headings = [
        "pass",
        "m×n",
        "dtype",
        "kernel",
        "rounds",
        "µs, median (quartiles)",
        "GB/s",
        "of copy",
        "µs on the host",
    ]
    rows = []
    for case in result.cases:
        (m, n), copy = case.parameters["shape"], bandwidth(case, COPY)
        for name, samples in case.samples.items():
            time, speed, host = case.summary(name), bandwidth(case, name), case.values[name].get("host_seconds")
            rows.append(
                [
                    case.parameters["pass"],
                    f"{m}×{n}",
                    case.parameters["dtype"],
                    name,
                    str(len(samples)),
                    f"{time.median * 1e6:.1f} ({time.lower_quartile * 1e6:.1f}–{time.upper_quartile * 1e6:.1f})",
                    f"{speed / 1e9:.0f}",
                    f"{speed / copy:.0%}",
                    "" if host is None else f"{host * 1e6:.0f}",
                ]
            )
    print_table(make_console(), headings, rows, numbers_from=4)


def bandwidth(case: Case, name: str) -> float:
    """Bytes a second at the median time."""
    return case.values[name]["bytes"] / case.summary(name).median


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    app()
