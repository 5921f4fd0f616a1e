# SPDX-License-Identifier: Apache-2.0
"""What the demo shows on the console."""

from collections.abc import Iterator
from contextlib import contextmanager

import datasets  # type: ignore[import-untyped]
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers.utils import logging as transformers_logging

from ..other_libraries import without_their_future_warnings
from .checks import SavedModelCheck, recovered_share
from .output import OutputFolder


def make_progress(console: Console) -> Progress:
    """A display of bars, each with a note behind it; only of their names where the console is not a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)


def add_bar(progress: Progress, description: str, total: int | None) -> TaskID:
    """Add a bar to the display, of unknown length if `total` is `None`."""
    if progress.disable:
        progress.console.print(f"{description} ...")
    return progress.add_task(description, total=total, note="")


@contextmanager
def show_step(progress: Progress, description: str) -> Iterator[None]:
    """Show a step without steps inside."""
    task = add_bar(progress, description, total=1)
    yield
    progress.update(task, completed=1)


def show_results(console: Console, output: OutputFolder, checks: dict[str, SavedModelCheck], seconds: float) -> None:
    """Print the table of all models, and where the files are."""
    titles = {
        "dense": "Dense",
        "pruned": "Pruned to 2:4 (Wanda)",
        "lora_merged": "LoRA, merged",
        "lora_masked": "LoRA, merged, masked again",
        "spp_merged": "SPP, merged",
    }
    table = Table("Model", title="Held-out text, measured on the saved models")
    for heading in ("Perplexity", "Sparsity", "2:4 groups", "Still 2:4"):
        table.add_column(heading, justify="right")
    for name, check in checks.items():
        table.add_row(
            titles[name],
            f"{check.perplexity:.2f}",
            f"{check.sparsity:.1%}",
            f"{check.groups_2_4:.1%}",
            "yes" if check.is_2_4 else "no",
        )
    console.print(table)
    if checks["pruned"].perplexity > checks["dense"].perplexity:
        spp, lora, masked = (f"{recovered_share(checks, n):.0%}" for n in ("spp_merged", "lora_merged", "lora_masked"))
        console.print(
            f"SPP recovers {spp} of the log-perplexity lost to pruning and stays 2:4. LoRA recovers {lora} with a "
            f"dense model, and {masked} once it is masked to 2:4 again.",
            soft_wrap=True,
        )
    # A path may hold what Rich takes for markup.
    for line in (
        f"SPP adapter:  {output.spp_adapter}",
        f"Merged model: {output.spp_merged} (plain Transformers loads it)",
    ):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    console.print(f"Took {seconds:.0f} s.")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """While active, other libraries do not print progress bars and notes between the demo's own output."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with without_their_future_warnings():
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
        datasets.enable_progress_bars()
