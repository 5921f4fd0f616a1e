# SPDX-License-Identifier: Apache-2.0
"""
A training run that stops dead at a given moment and waits to be killed: a script of its own.

    python killed_run.py OUTPUT_DIR MARKER WHERE

The folders of the package, `tests` and `tests/training` have to be on PYTHONPATH.

Saves a checkpoint every two steps. WHERE is "step" (in the midst of step 5, with the forward pass of it done),
"optimizer" (checkpoint-4 has its adapter and no more) or "state" (checkpoint-4 lacks only the state of the trainer).
MARKER is written when the run has come there.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch

from helpers.trl_cases import make_trainer


RUN = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}


def wait(marker: Path) -> NoReturn:
    marker.touch()
    while True:
        time.sleep(1)


def main(output_dir: str, marker: str, where: str) -> None:
    torch.set_num_threads(1)
    trainer: Any = make_trainer("sft", Path(output_dir), **RUN)
    method_name, step = {
        "step": ("compute_loss", 4),
        "optimizer": ("_save_optimizer_and_scheduler", 4),
        "state": ("_save_rng_state", 4),
    }[where]
    method = getattr(trainer, method_name)

    def stop_dead(*args: Any, **kwargs: Any) -> Any:
        result = None if where == "optimizer" and trainer.state.global_step == step else method(*args, **kwargs)
        if trainer.state.global_step == step:
            wait(Path(marker))
        return result

    setattr(trainer, method_name, stop_dead)
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
