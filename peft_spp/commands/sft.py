# SPDX-License-Identifier: Apache-2.0
"""The command `sft`."""

from __future__ import annotations

import typer

from .console import needs_train_extra
from .ending import TROUBLE


def sft(context: typer.Context) -> None:
    """
    Fine-tune a model with SPP and TRL's `SFTTrainer`. Takes TRL's flags and YAML files, and SPP's (`--spp_r`).

    `accelerate launch -m peft_spp.sft` takes the same arguments and runs on several devices or machines.
    """
    with needs_train_extra():
        from ..sft.errors import InputError
        from ..sft.processes import is_first_process
        from ..sft.run import main

    try:
        main(context.args)
    except InputError as error:
        # all processes of a launcher find the same
        if is_first_process():
            raise
        raise typer.Exit(code=TROUBLE) from error
