# SPDX-License-Identifier: Apache-2.0
"""The command `sft`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from inspect import Parameter
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer

from ..sft.spp_arguments import SPPArguments
from .console import needs_train_extra
from .ending import TROUBLE, Command
from .late_options import as_options, option


# The flags of TRL that most runs set. Those of all, with TRL's help, take seconds to import.
_OFTEN_SET: dict[str, tuple[type, str]] = {
    "model_name_or_path": (str, "The pruned model: a folder or a Hub id."),
    "dataset_name": (str, "The data: a file, a folder or a Hub id."),
    "output_dir": (str, "The folder for checkpoints and the adapter."),
    "learning_rate": (float, "The learning rate after warmup."),
    "num_train_epochs": (float, "How many times to go through the data."),
    "max_steps": (int, "How many steps to train, instead of epochs."),
    "per_device_train_batch_size": (int, "Rows in a batch on each device."),
    "gradient_accumulation_steps": (int, "Batches in a step."),
    "max_length": (int, "Tokens after which a row is truncated."),
    "packing": (bool, "Fill sequences with several rows each."),
    "load_in_4bit": (bool, "Quantize the model with bitsandbytes, as QLoRA does."),
    "use_cpu": (bool, "Train on the CPU. Needs --bf16 false to train in float32."),
    "resume_from_checkpoint": (str, "A checkpoint's folder, or true for the last one in the output folder."),
}


class SFTCommand(Command):
    """Shows SPP's flags and the common ones of TRL, and leaves the reading of all flags to TRL's parser."""

    def get_params(self, ctx: Any) -> list[Any]:
        return [*as_options([*_often_set(), *_spp(), *_help()]), *super().get_params(ctx)]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing and {"-h", "--help"} & set(args):
            typer.echo(ctx.get_help(), color=ctx.color)
            ctx.exit()
        ctx.args = list(args)
        return ctx.args


def sft(context: typer.Context) -> None:
    """
    Fine-tune a model with SPP and TRL's `SFTTrainer`. Takes TRL's flags and YAML files, and SPP's (`--spp_r`).

    `accelerate launch -m peft_spp.sft` takes the same arguments and runs on several devices or machines.
    """
    with needs_train_extra():
        from ..sft.errors import InputError
        from ..sft.processes import is_first_process
        from ..sft.run import main

    try:
        main(["--help" if word == "--help-all" else word for word in context.args])
    except InputError as error:
        # all processes of a launcher find the same
        if is_first_process():
            raise
        raise typer.Exit(code=TROUBLE) from error


def _often_set() -> Iterator[Parameter]:
    panel = "Flags of TRL that are often set"
    yield option("config", str, metavar="FILE", help="A YAML file of arguments.", rich_help_panel=panel)
    for name, (kind, text) in _OFTEN_SET.items():
        yield option(name, kind, help=text, rich_help_panel=panel)


def _spp() -> Iterator[Parameter]:
    hints = get_type_hints(SPPArguments)
    for field in fields(SPPArguments):
        kind, text = hints[field.name], field.metadata["help"]
        metavar = f"[{'|'.join(get_args(kind))}]" if get_origin(kind) is Literal else None
        simple = kind if kind in (bool, int, float) else str
        yield option(field.name, simple, field.default, metavar=metavar, help=text, rich_help_panel="Flags of SPP")


def _help() -> Iterator[Parameter]:
    yield option("help_all", bool, flag="--help-all", help="Show all flags, those of TRL's SFTConfig among them.")
    yield option("help", bool, help="Show this message and exit.")
