# SPDX-License-Identifier: Apache-2.0
"""The command `inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..installing import how_to_install
from .console import JsonOption, as_modules, print_report, progress_bar


def inspect(
    source: Annotated[
        str, typer.Argument(help="A model, an SPP adapter or a folder of safetensors: a path or a Hub id.")
    ],
    pattern: Annotated[
        list[str] | None,
        typer.Option(help="A pattern to look for (repeat the option for several). By default, 2:4, 4:8 and 2:8."),
    ] = None,
    modules: Annotated[
        list[str] | None,
        typer.Option(
            help="Linear layers of a model to inspect: names or suffixes (repeat the option for several), or one "
            "regular expression for the full name."
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="The base model of an adapter, a folder or a Hub id: count the zeros of the merged weights. By "
            "default, none are counted."
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png",
            help="Draw a plot to this file (.png, .svg or .pdf), and replace it if it exists. Needs the extra `plot`.",
        ),
    ] = None,
    plot_module: Annotated[
        str | None,
        typer.Option(
            help="The layer whose weight is plotted. By default, the first of a model, and the one that an adapter "
            "changes most."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """
    Show how sparse a model is and where its zeros are, or what an adapter learned.

    The model is not built: tensors are read from its files, one at a time. The plot of a model shows the sparsity by
    layer and kind of module, and one mask; the plot of an adapter shows how much it changes the weights. An adapter of
    experts is shown expert by expert, and needs the config.json of its base model.
    """
    from ..inspection import AdapterInspection, CheckpointInspection, inspect_adapter, inspect_checkpoint
    from .sources import local_source

    if plot is not None:
        _check_plot(plot)
    elif plot_module is not None:
        raise ValueError(f"--plot-module {plot_module} does nothing without --plot: add it")
    chosen = as_modules(modules, "--modules")
    path = local_source(source)
    if path.name == "adapter_model.safetensors":
        path = path.parent  # its settings lie next to it
    found: AdapterInspection | CheckpointInspection
    if _is_adapter(path):
        if pattern or modules:
            raise ValueError(f"--pattern and --modules apply to models, and {source} is an adapter")
        with progress_bar("Merging") as progress:
            found = inspect_adapter(path, base=base, progress=progress)
    else:
        if base is not None:
            raise ValueError(f"--base applies to adapters, and {source} is a model")
        patterns = pattern or ("2:4", "4:8", "2:8")
        with progress_bar("Reading") as progress:
            found = inspect_checkpoint(path, patterns=patterns, modules=chosen, progress=progress)
    if plot is not None:
        from ..inspection.plots import plot_adapter, plot_checkpoint

        if isinstance(found, AdapterInspection):
            plot_adapter(found, plot, plot_module)
        else:
            plot_checkpoint(found, plot, plot_module)
    print_report(found, as_json)


def _is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter and no model: Transformers can save both into one."""
    from ..checkpoints.instead import holds_adapter

    others = (file for file in path.glob("*.safetensors") if file.name != "adapter_model.safetensors")
    return holds_adapter(path) and next(others, None) is None


def _check_plot(plot: Path) -> None:
    """Before anything is read, which may take long."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise ValueError(f"--plot needs Matplotlib. Install it with: {how_to_install('plot')}")
    if plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot {plot} must end in .png, .svg or .pdf")
    if not plot.parent.is_dir():
        raise ValueError(f"--plot {plot}: the folder {plot.parent} does not exist")
