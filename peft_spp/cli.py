# SPDX-License-Identifier: Apache-2.0
"""The command line of peft_spp: a table of contents of `peft_spp.commands`."""

from typing import Annotated

import typer

from ._version import __version__
from .commands.compare import compare
from .commands.compress import compress, decompress
from .commands.convert import convert
from .commands.demo import demo
from .commands.exit_codes import Command, CommandGroup
from .commands.export import export
from .commands.inspect import inspect
from .commands.merge import merge
from .commands.plan import plan
from .commands.prune import PruneCommand, prune
from .commands.train import TrainingCommand, help_of, train
from .sft.methods import METHODS


app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
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
app.command(cls=Command)(demo)
app.command(cls=PruneCommand)(prune)
# their arguments are for TRL's parser
for method in METHODS.values():
    app.command(method.name, cls=TrainingCommand, help=help_of(method), add_help_option=False)(train)
for command in (plan, merge, compress, decompress, inspect, compare, export, convert):
    app.command(cls=Command)(command)
