# SPDX-License-Identifier: Apache-2.0
"""Command line options that benchmarks share."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer

from .environment import describe_environment, machine_slug
from .results import BenchmarkResult, result_path
from .timing import Rounds


class Device(StrEnum):
    cpu = "cpu"
    cuda = "cuda"


class Checkpointing(StrEnum):
    """Which settings of gradient checkpointing are measured."""

    off = "off"
    on = "on"
    both = "both"

    def values(self) -> list[bool]:
        return [False, True] if self is Checkpointing.both else [self is Checkpointing.on]


CheckpointingOption = Annotated[Checkpointing, typer.Option(help="Gradient checkpointing, not re-entrant.")]
BatchOption = Annotated[
    int | None, typer.Option(min=1, help="Sequences in a batch, instead of the device's 2 (CPU) or 4 (CUDA).")
]
SequenceOption = Annotated[
    int | None, typer.Option(min=2, help="Tokens in a sequence, instead of the device's 512 (CPU) or 2048 (CUDA).")
]
ShapeOption = Annotated[
    list[str], typer.Option(metavar="MxN", help="Rows and columns of the weight. May be repeated.")
]
PrecisionOption = Annotated[
    list[str],
    typer.Option(help="fp32, bf16, or bf16-autocast (bf16 weights, forward under autocast). May be repeated."),
]
CompetitorOption = Annotated[
    list[str], typer.Option(help="What to compare, by the names in benchmarks/competitors. May be repeated.")
]
DeviceCompetitorOption = Annotated[
    list[str] | None,
    typer.Option(
        help="What to compare; by default all, on CUDA without masked_full. May be repeated.", show_default=False
    ),
]
DeviceOption = Annotated[Device, typer.Option(help="What to measure on.")]
MachineOption = Annotated[
    str | None, typer.Option(help="The folder of the results; by default the name of the CPU or GPU.")
]
OutputOption = Annotated[Path, typer.Option(help="The folder that holds the folders of all machines.")]
RoundsOption = Annotated[
    int | None, typer.Option(min=1, help="Rounds of each case, instead of as many as --seconds allows.")
]
SecondsOption = Annotated[float, typer.Option(min=0.0, help="About how long the rounds of each case shall take.")]
WarmupOption = Annotated[
    int | None, typer.Option(min=1, help="Rounds of each case that are not kept; by default 1, on CUDA 3.")
]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="PyTorch's threads; by default as PyTorch chooses.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of weights, data and the order in each round.")]
QuickOption = Annotated[
    bool, typer.Option("--quick", help="Tiny sizes and two rounds, to see that everything works. Not a measurement.")
]
PlotOnlyOption = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, metavar="JSON", help="Only draw the picture of this result again."),
]

DEFAULT_OUTPUT = Path("benchmarks/results")

Value = TypeVar("Value")


@dataclass(frozen=True)
class Run:
    """A run of a benchmark.

    Args:
        benchmark (`str`): The name of the benchmark.
        device (`torch.device`): What is measured.
        json_path (`Path`): The file of the result; the picture lies next to it.
    """

    benchmark: str
    device: torch.device
    json_path: Path

    @property
    def picture_path(self) -> Path:
        return self.json_path.with_suffix(".png")

    def new_result(self, reference: str, **settings: Any) -> BenchmarkResult:
        """
        A result without cases yet.

        Args:
            reference (`str`): The contestant that ratios are taken to.
            settings: The settings common to all cases.
        """
        return BenchmarkResult(self.benchmark, reference, settings, describe_environment(self.device))


def start_run(
    benchmark: str, device: Device, machine: str | None, output_dir: Path, threads: int | None, quick: bool
) -> Run:
    """
    Set the number of threads, and find the device and the files of a run.

    Args:
        benchmark (`str`): The name of the benchmark.
        device (`Device`): What to measure on.
        machine (`str`, *optional*): The folder of the results, by default the name of the CPU or GPU.
        output_dir (`Path`): The folder that holds the folders of all machines.
        threads (`int`, *optional*): PyTorch's threads, by default as PyTorch chooses.
        quick (`bool`): Whether this is a trial, whose result must not replace a measurement.

    Raises:
        typer.BadParameter: If there is no CUDA device, or `machine` is not a plain folder name.
    """
    if device is Device.cuda and not torch.cuda.is_available():
        raise typer.BadParameter("PyTorch finds no CUDA device here. Use --device cpu.", param_hint="--device")
    if machine is not None and (not machine or Path(machine).name != machine):
        raise typer.BadParameter(f"{machine!r} is not the name of a folder.", param_hint="--machine")
    if threads is not None:
        torch.set_num_threads(threads)
    # with its index, as tensors on it have it
    place = torch.device("cuda", torch.cuda.current_device()) if device is Device.cuda else torch.device("cpu")
    return Run(benchmark, place, result_path(output_dir, machine or machine_slug(place), benchmark, quick))


def make_rounds(
    device: Device,
    quick: bool,
    *,
    rounds: int | None,
    seconds: float,
    warmup: int | None,
    minimum: int,
    maximum: int | None = None,
) -> Rounds:
    """
    How many rounds a case gets, by the options.

    Args:
        device (`Device`): On CUDA the default of `warmup` is 3 and that of `maximum` is 100, otherwise 1 and 25.
        quick (`bool`): Whether 2 rounds do.
        rounds (`int`, *optional*): This many rounds.
        seconds (`float`): About how long the rounds shall take.
        warmup (`int`, *optional*): Rounds that are not kept.
        minimum (`int`): The fewest rounds.
        maximum (`int`, *optional*): The most rounds.
    """
    on_cuda = device is Device.cuda
    return Rounds(
        seconds=seconds,
        minimum=minimum,
        maximum=maximum or (100 if on_cuda else 25),
        warmup=warmup or (3 if on_cuda else 1),
        exact=rounds or (2 if quick else None),
    )


def load_result(path: Path, benchmark: str) -> BenchmarkResult:
    """Read the result that `--plot-only` names, or end with an error that names the option."""
    try:
        return BenchmarkResult.load(path, benchmark)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--plot-only") from error


def choose(option: str, names: Sequence[str], known: Mapping[str, Value], required: str | None = None) -> list[Value]:
    """
    What names on the command line stand for, each once.

    Args:
        option (`str`): The option that the names are from.
        names (`Sequence[str]`): The names.
        known (`Mapping[str, Value]`): What there is, by name.
        required (`str`, *optional*): A name that must be among them.

    Raises:
        typer.BadParameter: If a name is not known, or the required one is missing.
    """
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{name!r} is not one of: {', '.join(known)}.", param_hint=option)
    if required is not None and required not in names:
        raise typer.BadParameter(f"{required!r} must be among them: ratios are taken to it.", param_hint=option)
    return [known[name] for name in dict.fromkeys(names)]


def parse_shapes(shapes: Sequence[str]) -> list[tuple[int, int]]:
    """
    Shapes (m, n) from the command line, such as `11008x4096`.

    Raises:
        typer.BadParameter: If one is written otherwise.
    """
    parsed = []
    for shape in dict.fromkeys(shapes):
        match = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", shape)
        if match is None:
            raise typer.BadParameter(f"{shape!r} is not a shape such as 11008x4096.", param_hint="--shape")
        parsed.append((int(match[1]), int(match[2])))
    return parsed
