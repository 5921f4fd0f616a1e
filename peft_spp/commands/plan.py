# SPDX-License-Identifier: Apache-2.0
"""The command `plan`."""

from __future__ import annotations

import math
import re
from enum import StrEnum
from typing import Annotated, Any

import typer

from ..checkpoints.names import targets_of_peft
from .console import JsonOption, print_report


_UNITS = {"GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20}


class Engine(StrEnum):
    """How several GPUs share the work."""

    ddp = "ddp"
    fsdp2 = "fsdp2"
    zero2 = "zero2"
    zero3 = "zero3"


class Dtype(StrEnum):
    """The dtype of a base model."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def plan(
    model: Annotated[
        str, typer.Argument(help="The model: a folder with a config.json, or the id of a repository on the Hub.")
    ],
    device_memory: Annotated[
        str | None, typer.Option(help="The memory of one GPU, such as 80GB or 24GiB, to compare the total with.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs.")] = 1,
    engine: Annotated[
        Engine,
        typer.Option(help="How several GPUs share the work. fsdp2 and zero3 shard the base model."),
    ] = Engine.fsdp2,
    sequence: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 2048,
    batch: Annotated[int, typer.Option(min=1, help="Sequences per batch on each GPU.")] = 1,
    dtype: Annotated[Dtype, typer.Option(help="The dtype of the base model.")] = Dtype.bfloat16,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute the blocks again in the backward pass.")
    ] = False,
    compressed: Annotated[
        bool, typer.Option("--compressed", help="Plan for a compressed base model, which does not store its zeros.")
    ] = False,
    sparsity: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="The share of zeros, for --compressed.", show_default="0.5"),
    ] = None,
    r: Annotated[int, typer.Option(min=1, help="Number of row blocks.")] = 16,
    target_modules: Annotated[
        list[str] | None,
        typer.Option(
            help="Linear layers to adapt, instead of those of the blocks: names, one regular expression, or "
            "'all-linear'."
        ),
    ] = None,
    target_parameters: Annotated[
        list[str] | None,
        typer.Option(
            help="Stacks of experts to adapt: parameters by name or suffix, such as experts.down_proj (repeat the "
            "option for several).",
            show_default="none",
        ),
    ] = None,
    device_tflops: Annotated[
        float, typer.Option(min=0.1, help="The dense rate of one GPU in --dtype, from its data sheet, in TFLOP/s.")
    ] = 312.0,
    utilization: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="The share of --device-tflops that training is assumed to reach.")
    ] = 0.4,
    as_json: JsonOption = False,
) -> None:
    """
    Compute the memory and the time of a training step. Only the model's config.json is read.

    The step runs on the meta device, where tensors have shapes and no values; nothing is measured. The default of
    `--device-tflops` is that of an A100 in bfloat16.
    """
    import torch

    from ..planning import plan_checkpoint
    from ..planning.estimate import Estimate
    from ..tuner import SPPConfig

    if sparsity is not None and not compressed:
        raise ValueError(f"--sparsity {sparsity:g} does nothing without --compressed: add it")
    if not math.isfinite(device_tflops):
        raise ValueError(f"--device-tflops {device_tflops} is not finite")
    memory = None if device_memory is None else _bytes(device_memory)
    targets: Any = targets_of_peft(target_modules, "--target-modules") if target_modules else None
    found = plan_checkpoint(
        model,
        dtype=getattr(torch, dtype.value),
        config=SPPConfig(r=r, target_modules=targets, target_parameters=target_parameters or []),
        batch=batch,
        sequence=sequence,
        gradient_checkpointing=gradient_checkpointing,
        sparsity=(0.5 if sparsity is None else sparsity) if compressed else None,
        gpus=gpus,
        engine=engine.value,
    )
    print_report(Estimate(found, memory, device_tflops, utilization), as_json)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]+)?)\s*(\w+)", text)
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"--device-memory {text} is not a number with one of {', '.join(_UNITS)}, such as 80GB")
    return int(float(match[1]) * _UNITS[match[2]])
