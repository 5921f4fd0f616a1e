# SPDX-License-Identifier: Apache-2.0
"""Five steps of Transformers' Trainer on a saved model, in one process or as `accelerate launch` starts it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import get_peft_model
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

from peft_spp import SPPConfig


GLOBAL_BATCH = 8
STEPS = 5


def token_ids(rows: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 64, (rows, 16), generator=torch.Generator().manual_seed(seed))


def deepspeed() -> bool:
    return os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


def on_cpu() -> None:
    """Let accelerate use CPUs and gloo for what the configuration asks for."""
    if deepspeed():
        from deepspeed.ops import __compatible_ops__

        # compiling its collectives for shared memory takes minutes, and gloo has them too
        __compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed takes the CPU because `DS_ACCELERATOR` says so
    PartialState(cpu=not deepspeed(), backend="gloo" if "WORLD_SIZE" in os.environ else None)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # accelerate looks at the configuration of FSDP only if the processes are not of its CPU kind
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def save(trainer: Trainer, folder: str) -> None:
    model = trainer.model_wrapped
    if not isinstance(model, FullyShardedDataParallel):
        trainer.save_model(folder)
        return
    # the trainer gathers a state dict on the host, which FSDP1 cannot do where the host is the device
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, FullStateDictConfig()):
        state_dict = model.state_dict()
    if trainer.is_world_process_zero():
        trainer.model.save_pretrained(folder, state_dict=state_dict)


def train(base: str, output: str, processes: int = 1, **settings: Any) -> None:
    """
    Train an adapter and save it, the losses, and the logits of the trained model.

    Args:
        base (`str`): The folder of the base model.
        output (`str`): The folder to write `adapter/`, `losses.json` and `logits.pt` to.
        processes (`int`): How many processes the global batch is split over.
        settings: Further settings of the adapter.
    """
    on_cpu()
    # the arguments come first: they say how the model is to be partitioned while it is loaded
    args = TrainingArguments(
        output_dir=f"{output}/trainer",
        per_device_train_batch_size=GLOBAL_BATCH // processes,
        max_steps=STEPS,
        learning_rate=3e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
        use_cpu=not deepspeed(),
        accelerator_config={"use_configured_state": True},
    )
    if deepspeed():
        # whatever its size, a parameter is to be partitioned
        args.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    model = AutoModelForCausalLM.from_pretrained(base)
    set_seed(0)
    model = get_peft_model(model, SPPConfig(r=4, task_type="CAUSAL_LM", **settings))
    data = [{"input_ids": row, "labels": row} for row in token_ids(GLOBAL_BATCH * STEPS, seed=1)]
    trainer = Trainer(model, args, train_dataset=data)
    trainer.train()
    save(trainer, f"{output}/adapter")
    with torch.no_grad():
        logits = trainer.model_wrapped(input_ids=token_ids(2, seed=2).to(args.device)).logits
    if trainer.is_world_process_zero():
        torch.save(logits.cpu(), Path(output) / "logits.pt")
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        (Path(output) / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    train(sys.argv[1], sys.argv[2], processes=int(sys.argv[3]), **json.loads(sys.argv[4]))
