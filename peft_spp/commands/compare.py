# SPDX-License-Identifier: Apache-2.0
"""The command `compare`."""

from __future__ import annotations

from typing import Annotated

import typer

from .console import JsonOption, as_modules, errors_as_messages, progress_bar


# as `diff` and `grep` do
DIFFERENT, TROUBLE = 1, 2


def compare(
    base: Annotated[str, typer.Argument(help="The pruned model: a folder, a safetensors file or a Hub id.")],
    merged: Annotated[str, typer.Argument(help="What became of it, by fine-tuning and merging.")],
    modules: Annotated[
        list[str] | None,
        typer.Option(
            help="Which layers to compare: names or their ends, one for each time the option is given, or one regular "
            "expression for the whole name."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """
    Check that no pruned place of a model was lost: which zeros of BASE are no zeros in MERGED, and which are new.

    The exit code is 0 if every zero was kept, 1 if one was lost or a layer could not be compared, and 2 if something
    could not be read.
    """
    import json

    with errors_as_messages(TROUBLE):
        from ..sparsity import compare_sparsity
        from .sources import local_source

        before, after = local_source(base), local_source(merged)
        with progress_bar("Comparing") as progress:
            comparison = compare_sparsity(before, after, modules=as_modules(modules), progress=progress)
    if as_json:
        typer.echo(json.dumps(comparison.to_dict(), indent=2))
    else:
        typer.echo(f"{comparison.table()}\n\n{comparison}" if len(comparison) else str(comparison))
    if not comparison.kept:
        raise typer.Exit(code=DIFFERENT)
