# SPDX-License-Identifier: Apache-2.0
"""The command `compare`."""

from __future__ import annotations

from typing import Annotated

import typer

from .console import JsonOption, as_modules, progress_bar
from .exit_codes import FOUND
from .terminal import print_text


def compare(
    base: Annotated[str, typer.Argument(help="The pruned model: a folder, a safetensors file or a Hub id.")],
    merged: Annotated[str, typer.Argument(help="The model after fine-tuning and merging.")],
    modules: Annotated[
        list[str] | None,
        typer.Option(
            help="Linear layers to compare: names or suffixes (repeat the option for several), or one regular "
            "expression for the full name."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """
    Check that a model kept all zeros: which zeros of BASE are lost in MERGED, and which are new.

    The exit code is 0 if every zero was kept, 1 if one was lost or a layer could not be compared, and 2 if a file
    could not be read.
    """
    import json

    from ..sparsity import compare_sparsity
    from .sources import local_source

    chosen = as_modules(modules, "--modules")
    before, after = local_source(base), local_source(merged)
    with progress_bar("Comparing") as progress:
        comparison = compare_sparsity(before, after, modules=chosen, progress=progress)
    if as_json:
        print_text(json.dumps(comparison.to_dict(), indent=2))
    else:
        print_text(f"{comparison.table()}\n\n{comparison}" if len(comparison) else str(comparison))
    if not comparison.kept:
        raise typer.Exit(code=FOUND)
