# SPDX-License-Identifier: Apache-2.0
"""The command `prune`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .console import (
    ExcludeModulesOption,
    JsonOption,
    TargetModulesOption,
    as_modules,
    print_report,
    progress_bar,
)


class Method(str, Enum):
    wanda = "wanda"
    magnitude = "magnitude"
    sparsegpt = "sparsegpt"


def prune(
    model: Annotated[str, typer.Argument(help="The dense model: a folder, or the id of a repository on the Hub.")],
    out: Annotated[Path, typer.Argument(help="The folder to write the pruned model to.")],
    method: Annotated[Method, typer.Option(help="How to choose what to prune.")] = Method.wanda,
    pattern: Annotated[str | None, typer.Option(metavar="N:M", help="Keep N of M weights in a row, as 2:4.")] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="The share of the weights to prune, as 0.5, where no pattern is given.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help='A file of plain text, or of JSON, CSV or Parquet with a "text" in each row, which needs the extra '
            "`train`. Magnitude pruning does without."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many sequences to draw from it.")] = 128,
    sequence_length: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens in each; by default 2048, or the model's context if it is shorter."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draw.")] = 0,
    target_modules: TargetModulesOption = None,
    exclude_modules: ExcludeModulesOption = None,
    damping: Annotated[float, typer.Option(help="SparseGPT: what is added to the Hessian's diagonal.")] = 0.01,
    block_size: Annotated[int, typer.Option(help="SparseGPT: the inputs between two updates.")] = 128,
    device: Annotated[str | None, typer.Option(help="Where to compute; by default on a GPU if there is one.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model in the folder, and nothing else.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and say what would be pruned, but write nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """
    Prune a dense model to 2:4 or another pattern, with one of its blocks in memory at a time.

    By default all linear layers inside the transformer blocks are pruned; embeddings and the language model head are
    left as they are. Either the whole pruned model is written, or nothing.
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
            damping=damping,
            block_size=block_size,
            device=device,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=progress,
        )
    print_report(report, as_json)
