# SPDX-License-Identifier: Apache-2.0
"""
What `import peft_spp` takes next to `import peft`: `python -m benchmarks.import_time`.

Each import is timed by a fresh process, without the start of the interpreter. A round is one process of each, in a
random order, so that load from elsewhere meets both alike. The target is a median ratio of 1.05.
"""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Annotated

import typer

from .harness import BenchmarkResult, Case, format_ratio, format_seconds, make_console, print_table
from .harness import options as opt


NAME = "import_time"
REFERENCE = "peft"
MODULES = (REFERENCE, "peft_spp")
TARGET = 1.05

app = typer.Typer(add_completion=False)


@app.command()
def main(
    rounds: Annotated[int, typer.Option(min=1, help="How many times each is imported.")] = 15,
    machine: opt.MachineOption = None,
    output_dir: opt.OutputOption = opt.DEFAULT_OUTPUT,
    seed: opt.SeedOption = 0,
    quick: opt.QuickOption = False,
) -> None:
    """Time both imports in fresh processes, in turns."""
    run = opt.start_run(NAME, opt.Device.cpu, machine, output_dir, None, quick)
    result = run.new_result(REFERENCE, target=TARGET, seed=seed)
    result.cases.append(measure(1 if quick else rounds, seed))
    result.save(run.json_path)
    report(result)
    make_console().print(f"Written: {run.json_path}")


def measure(rounds: int, seed: int) -> Case:
    """
    Time the imports in rounds.

    Args:
        rounds (`int`): How many, after one that is not kept and fills the caches of files.
        seed (`int`): Seed of the order within each round.

    Returns:
        `Case`: The times of each module.
    """
    order, numbers = list(MODULES), random.Random(seed)
    case = Case({}, samples={module: [] for module in MODULES})
    for kept in range(rounds + 1):
        numbers.shuffle(order)
        for module in order:
            seconds = time_import(module)
            if kept:
                case.samples[module].append(seconds)
    return case


def time_import(module: str) -> float:
    """The seconds that a fresh process takes to import a module."""
    code = f"import time; begin = time.perf_counter(); import {module}; print(time.perf_counter() - begin)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout)


def report(result: BenchmarkResult) -> None:
    """Print the times and their ratio."""
    (case,) = result.cases
    rows = [
        [f"import {module}", format_seconds(case.summary(module)), format_ratio(case.ratio(module, REFERENCE))]
        for module in MODULES
    ]
    print_table(make_console(), ["", "ms (quartiles)", "× peft (quartiles)"], rows, numbers_from=1)


if __name__ == "__main__":
    app()
