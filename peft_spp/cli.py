# SPDX-License-Identifier: Apache-2.0
"""The command line of peft_spp: a table of contents of `peft_spp.commands`."""

from typing import Annotated

import typer

from ._version import __version__
from .commands.compare import compare
from .commands.compress import compress, decompress
from .commands.convert import convert
from .commands.demo import demo
from .commands.ending import CommandGroup
from .commands.export import export
from .commands.inspect import inspect
from .commands.merge import merge
from .commands.prune import prune
from .commands.sft import sft


app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"peft-spp {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Sparsity-preserving fine-tuning (SPP) of pruned language models, as a plugin for Hugging Face PEFT."""


# in the order in which a user needs them
app.command()(demo)
app.command()(prune)
# TRL's parser reads the arguments and prints the help
app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(sft)
app.command()(merge)
app.command()(compress)
app.command()(decompress)
app.command()(inspect)
app.command()(compare)
app.command()(export)
app.command()(convert)
