# SPDX-License-Identifier: Apache-2.0
"""The command `demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import needs_train_extra


def demo(
    output: Annotated[
        Path,
        typer.Option(
            help="Folder for the models. An earlier demo in it is replaced; a folder with other files is refused."
        ),
    ] = Path("peft-spp-demo"),
    seed: Annotated[int, typer.Option(min=0, help="Seed for the data split and all training runs.")] = 0,
) -> None:
    """
    Prune a small Llama to 2:4, fine-tune it with SPP and with LoRA, and compare the merged models.

    Works offline and takes about two minutes on two CPU cores. A small tokenizer and a small Llama are trained on a
    part of Python's own documentation, and the perplexity is measured on the rest. The documentation differs between
    Python versions, so the results differ a little too.
    """
    from ..demo.config import DemoConfig
    from ..demo.output import OutputFolder

    folder = OutputFolder(output)
    # Before the imports, which take seconds.
    folder.check()

    with needs_train_extra():
        from ..demo.run import run_demo

    import torch
    from rich.console import Console

    # The model is too small to gain from many threads, and on a machine that shows more cores than it may use they
    # would wait for each other most of the time.
    torch.set_num_threads(min(2, torch.get_num_threads()))
    run_demo(folder, DemoConfig(seed=seed), Console())
