# SPDX-License-Identifier: Apache-2.0
"""The command line of peft_spp."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ._version import __version__


app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")


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


@contextmanager
def _needs_train_extra() -> Iterator[None]:
    """Turn a missing package of the `train` extra into an error that says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("trl", "datasets"):
            raise
        typer.echo(f'Error: {error.name} is not installed. Install it with: pip install "peft-spp[train]"', err=True)
        raise typer.Exit(code=1) from error


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option(help="Folder for the models. An earlier demo in it is replaced, anything else is not.")
    ] = Path("peft-spp-demo"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the data split and all training.")] = 0,
) -> None:
    """
    Prune a small Llama to 2:4, fine-tune it with SPP and with LoRA, and compare the merged models.

    Works offline and takes about two minutes on two CPU cores. A small tokenizer and a small Llama are trained on a
    part of Python's own documentation; the perplexity is that on the rest. As Python versions differ in that text,
    they differ a little in the results.
    """
    from .demo.config import DemoConfig
    from .demo.output import OutputFolder

    folder = OutputFolder(output)
    try:
        # Before the imports, which take seconds.
        folder.check()
    except FileExistsError as error:
        raise typer.BadParameter(str(error), param_hint="--output") from error

    with _needs_train_extra():
        from .demo.run import run_demo

    import torch
    from rich.console import Console

    # The model is too small to gain from many threads, and on a machine that shows more cores than it may use they
    # would wait for each other most of the time.
    torch.set_num_threads(min(2, torch.get_num_threads()))
    run_demo(folder, DemoConfig(seed=seed), Console())


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(help="The adapter: a folder, or the id of a repository on the Hub.")],
    out: Annotated[Path, typer.Argument(help="The folder to write the merged model to.")],
    base: Annotated[
        str | None,
        typer.Option(help="The base model: a folder or a Hub id. By default the one that the adapter names."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is in the folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Merge, check and count, but write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """
    Merge an SPP adapter into a checkpoint, from disk to disk, in a few hundred megabytes of memory.

    The result has the bits of `merge_and_unload`, the base model's files and its zeros. Either all of it is written,
    or nothing.
    """
    import json

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from .merge import merge_checkpoint

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("Checking" if dry_run else "Merging", total=None)
            report = merge_checkpoint(
                base,
                adapter,
                out,
                overwrite=overwrite,
                dry_run=dry_run,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    except (OSError, ValueError) as error:
        typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(code=1) from error
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else str(report))


# TRL's parser reads the arguments and prints the help
@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def sft(context: typer.Context) -> None:
    """
    Fine-tune a model with SPP and TRL's `SFTTrainer`. Takes TRL's flags and YAML files, and SPP's (`--spp_r`).

    `accelerate launch -m peft_spp.sft` takes the same arguments and runs on several devices or machines.
    """
    with _needs_train_extra():
        from .sft.run import main as run_sft

    raise typer.Exit(run_sft(context.args))
