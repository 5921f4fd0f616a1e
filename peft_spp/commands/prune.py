# SPDX-License-Identifier: Apache-2.0
"""The command `prune`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from ..pruning.registry import METHODS, option_names
from .console import (
    ExcludeModulesOption,
    JsonOption,
    TargetModulesOption,
    as_modules,
    print_report,
    progress_bar,
)


Method = Enum("Method", {name: name for name in METHODS}, type=str)  # type: ignore[misc]
Command = TypeVar("Command", bound=Callable[..., None])


def with_method_options(command: Command) -> Command:
    """Give a command that takes `**options` the options of all pruning methods, before `--device`."""
    signature = inspect.signature(command, eval_str=True)
    kept = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
    place = next(number for number, one in enumerate(kept) if one.name == "device")
    for method in METHODS.values():
        types = get_type_hints(method)
        for field in fields(method):
            if field.name in option_names(method):
                kind: Any = Annotated[types[field.name], typer.Option(help=field.metadata["help"])]  # type: ignore
                kept.insert(place, kept[place].replace(name=field.name, default=field.default, annotation=kind))
                place += 1
    command.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in kept}
    return command


@with_method_options
def prune(
    model: Annotated[str, typer.Argument(help="The dense model: a folder, or the id of a repository on the Hub.")],
    out: Annotated[Path, typer.Argument(help="The folder to write the pruned model to.")],
    method: Annotated[Method, typer.Option(help="The pruning method.")] = Method.wanda,  # type: ignore[attr-defined]
    pattern: Annotated[
        str | None, typer.Option(metavar="N:M", help="Keep N of every M weights in a row, such as 2:4.")
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="The share of weights to prune, such as 0.5. Use this or --pattern.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help='Calibration data: a plain text file, or a JSON, CSV or Parquet file with a "text" column (needs '
            "the extra `train`). Magnitude pruning needs none."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Number of sequences to draw from the calibration data.")] = 128,
    sequence_length: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens per sequence. By default 2048, or the model's context length if it is shorter."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed for drawing the sequences.")] = 0,
    target_modules: TargetModulesOption = None,
    exclude_modules: ExcludeModulesOption = None,
    device: Annotated[
        str | None, typer.Option(help="Device to compute on. By default, a GPU if there is one.")
    ] = None,
    compress: Annotated[
        bool, typer.Option("--compress", help="Write compressed weights, without the zeros; see `peft-spp compress`.")
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace an existing model in the output folder; a folder with other files is refused."
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check everything and report what would be pruned, without writing anything."),
    ] = False,
    as_json: JsonOption = False,
    **options: Any,
) -> None:
    """
    Prune a dense model to 2:4 or another pattern, with one of its blocks in memory at a time.

    By default all linear layers inside the transformer blocks are pruned; embeddings and the language model head stay
    dense. The output is written completely or not at all.
    """
    from ..pruning import prune_checkpoint

    with progress_bar("Checking" if dry_run else "Pruning") as progress:
        report = prune_checkpoint(
            model,
            out,
            method=method.value,
            pattern=pattern,
            sparsity=sparsity,
            calibration=calibration,
            samples=samples,
            sequence_length=sequence_length,
            seed=seed,
            target_modules=as_modules(target_modules, "--target-modules"),
            exclude_modules=as_modules(exclude_modules, "--exclude-modules"),
            device=device,
            compress=compress,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=progress,
            **{name: options[name] for name in option_names(METHODS[method.value])},
        )
    print_report(report, as_json)
