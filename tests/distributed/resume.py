# SPDX-License-Identifier: Apache-2.0
"""What `accelerate launch` starts in the tests of resuming: a run that may be killed, or go on from its checkpoint."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from distributed_task import GLOBAL_BATCH, adapter_config, factors, token_ids
from peft import get_peft_model
from train import arguments, save_adapter, use_cpu
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint


class KillAt(TrainerCallback):
    """Kills every process when a step begins."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.steps:
            os.kill(os.getpid(), signal.SIGKILL)


def main(base: str, output: Path, kill_at: int | None) -> None:
    use_cpu()
    # a rate that changes with the steps, and clipping: both have to go on where they were
    settings = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear", "max_grad_norm": 1.0}
    args = arguments(output, **settings)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), adapter_config())
    model.load_state_dict(factors(model), strict=False)
    data = [{"input_ids": row, "labels": row} for row in token_ids(2 * GLOBAL_BATCH)]
    callbacks = [KillAt(kill_at)] if kill_at is not None else []
    trainer = Trainer(model, args, train_dataset=data, callbacks=callbacks)
    is_begun = Path(args.output_dir).is_dir() and get_last_checkpoint(args.output_dir) is not None
    trainer.train(resume_from_checkpoint=is_begun)
    save_adapter(trainer, output / "adapter")
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        (output / "losses.json").write_text(json.dumps({"resumed": is_begun, "losses": losses}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
