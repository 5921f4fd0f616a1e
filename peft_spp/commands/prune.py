# SPDX-License-Identifier: Apache-2.0
"""The command `prune`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from enum import Enum
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from ..pruning.options import OPTIONS
from .console import (
    ExcludeModulesOption,
    JsonOption,
    OverwriteModelOption,
    TargetModulesOption,
    as_modules,
    print_report,
    progress_bar,
)
from .exit_codes import Command
from .late_options import as_options, option


class PruneCommand(Command):
    """Has the pruning methods for `--method`, and the options of all of them."""

    def get_params(self, ctx: Any) -> list[Any]:
        params = super().get_params(ctx)
        names = [one.name for one in params]
        first, last = names.index("pattern"), names.index("device")
        method, *others = as_options(_method_options())
        return [*params[:first], method, *params[first:last], *others, *params[last:]]

    def invoke(self, ctx: Any) -> Any:
        # what the function has no parameters for
        ctx.obj = {one.name: ctx.params.pop(one.name) for one in as_options(_method_options())}
        return super().invoke(ctx)


def _method_options() -> Iterator[Parameter]:
    names = Enum("Method", {name: name for name in OPTIONS}, type=str)  # type: ignore[misc]
    yield option("method", names, names["wanda"], help="The pruning method.")
    for options in OPTIONS.values():
        types = get_type_hints(options)
        for field in fields(options):
            flag = f"--{field.name.replace('_', '-')}"
            yield option(field.name, types[field.name], field.default, flag=flag, help=field.metadata["help"])


def prune(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="The dense model: a folder, or the id of a repository on the Hub.")],
    out: Annotated[Path, typer.Argument(help="The folder to write the pruned model to.")],
    pattern: Annotated[
        str | None, typer.Option(metavar="N:M", help="Keep N of every M consecutive weights, such as 2:4.")
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="The share of weights to prune, such as 0.5. Give this or --pattern.")
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
    overwrite: OverwriteModelOption = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check everything and report what would be pruned, without writing anything."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """
    Prune a dense model to 2:4 or another pattern, with one of its blocks in memory at a time.

    By default all linear layers inside the transformer blocks are pruned, with the experts of a mixture; embeddings,
    routers and the language model head stay dense. The output is written completely or not at all.
    """
    from ..pruning import prune_checkpoint

    method = context.obj["method"]
    method = getattr(method, "value", method)  # older versions of Typer leave it a string
    with progress_bar("Checking" if dry_run else "Pruning") as progress:
        report = prune_checkpoint(
            model,
            out,
            method=method,
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
            **{one.name: context.obj[one.name] for one in fields(OPTIONS[method])},
        )
    print_report(report, as_json)
