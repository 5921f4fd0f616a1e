# SPDX-License-Identifier: Apache-2.0
"""The command `sft`."""

from __future__ import annotations

import typer

from .console import needs_train_extra


def sft(context: typer.Context) -> None:
    """
    Fine-tune a model with SPP and TRL's `SFTTrainer`. Takes TRL's flags and YAML files, and SPP's (`--spp_r`).

    `accelerate launch -m peft_spp.sft` takes the same arguments and runs on several devices or machines.
    """
    with needs_train_extra():
        from ..sft.run import main

    raise typer.Exit(main(context.args))
