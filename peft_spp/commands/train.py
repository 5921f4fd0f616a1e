# SPDX-License-Identifier: Apache-2.0
"""The commands that train: `sft`, `dpo` and the other methods of TRL."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from inspect import Parameter
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer

from ..sft.methods import METHODS, Method
from .console import needs_train_extra
from .exit_codes import TROUBLE, Command
from .late_options import as_options, option


# The flags of TRL that most runs of all methods set. Those of all, with TRL's help, take seconds to import.
_OFTEN_SET: dict[str, tuple[type, str]] = {
    "model_name_or_path": (str, "The pruned model: a folder or a Hub id."),
    "dataset_name": (str, "The data: a file, a folder or a Hub id."),
    "output_dir": (str, "The folder for checkpoints and the adapter. An adapter in it is replaced."),
    "learning_rate": (float, "The learning rate after warmup. TRL's default is too low for SPP: start from {rate:g}."),
    "num_train_epochs": (float, "Number of passes over the data."),
    "max_steps": (int, "Number of optimizer steps, instead of epochs."),
    "per_device_train_batch_size": (int, "Rows per batch on each device."),
    "gradient_accumulation_steps": (int, "Batches per optimizer step."),
    "load_in_4bit": (bool, "Quantize the model with bitsandbytes, as QLoRA does."),
    "use_cpu": (bool, "Train on the CPU. Add --bf16 false to train in float32."),
    "resume_from_checkpoint": (
        str,
        "A checkpoint's folder, or true for the last one in the output folder, or auto for that one if there is one.",
    ),
}


class TrainingCommand(Command):
    """Shows SPP's flags and the common ones of TRL, and leaves the reading of all flags to TRL's parser."""

    def get_params(self, ctx: Any) -> list[Any]:
        method = METHODS[str(self.name)]
        return [*as_options([*_often_set(method), *_spp(method), *_help(method)]), *super().get_params(ctx)]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing and {"-h", "--help"} & set(args):
            typer.echo(ctx.get_help(), color=ctx.color)
            ctx.exit()
        ctx.args = list(args)
        return ctx.args


def help_of(method: Method) -> str:
    """The text above the flags in the help of a method's command."""
    return (
        f"{method.summary} Takes TRL's flags and YAML files, and SPP's flags, such as `--spp_r`.\n\n"
        f"`accelerate launch -m peft_spp {method.name}` takes the same arguments and runs on several devices or "
        "machines."
    )


def train(context: typer.Context) -> None:
    """Run the method that the command is named for."""
    with needs_train_extra():
        from ..sft.errors import InputError
        from ..sft.processes import is_first_process
        from ..sft.run import main

    try:
        main(["--help" if word == "--help-all" else word for word in context.args], str(context.command.name))
    except InputError as error:
        # all processes of a launcher find the same
        if is_first_process():
            raise
        raise typer.Exit(code=TROUBLE) from error


def _often_set(method: Method) -> Iterator[Parameter]:
    panel = "Common TRL flags (--help-all shows all, with their defaults)"
    yield option("config", str, metavar="FILE", help="A YAML file of arguments.", rich_help_panel=panel)
    for name, (kind, text) in {**_OFTEN_SET, **method.often_set}.items():
        yield option(name, kind, help=text.format(rate=method.start_rate), rich_help_panel=panel)


def _spp(method: Method) -> Iterator[Parameter]:
    hints = get_type_hints(method.arguments)
    for field in fields(method.arguments):
        kind, text = hints[field.name], field.metadata["help"]
        metavar = f"[{'|'.join(get_args(kind))}]" if get_origin(kind) is Literal else None
        simple = kind if kind in (bool, int, float) else str
        yield option(field.name, simple, field.default, metavar=metavar, help=text, rich_help_panel="SPP flags")


def _help(method: Method) -> Iterator[Parameter]:
    config = method.config.rpartition(":")[2]
    yield option("help_all", bool, flag="--help-all", help=f"Show all flags, including those of TRL's {config}.")
    yield option("help", bool, help="Show this message and exit.")
