# SPDX-License-Identifier: Apache-2.0
"""What `accelerate launch` starts in the test of the guard: runs with sharded parameters, a sound one and others."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from distributed_task import GLOBAL_BATCH, adapter_config, factors, token_ids
from peft import get_peft_model
from train import arguments, use_cpu
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from peft_spp import SPPGuardCallback
from peft_spp.tuner.engines import is_sharded, local_part


STEPS = 3


class After(TrainerCallback):
    """Does something to a layer after the second step, before the guard looks."""

    def __init__(self, change: Callable[[torch.nn.Module], None]) -> None:
        self.change = change

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            with torch.no_grad():
                self.change(model.base_model.model.model.layers[1].mlp.up_proj)


def nothing(layer: torch.nn.Module) -> None:
    assert is_sharded(layer.get_base_layer().weight)


def fill_zeros(layer: torch.nn.Module) -> None:
    """In the shard of every process."""
    part = local_part(layer.get_base_layer().weight)
    part[part == 0] = 1e-3


def change_values(layer: torch.nn.Module) -> None:
    """Through `.data`, which PyTorch does not count."""
    local_part(layer.get_base_layer().weight).data.mul_(2)


def spoil_a_factor(layer: torch.nn.Module) -> None:
    """In one process only: the others must stop, too, instead of waiting for it."""
    if torch.distributed.get_rank() == 1:
        local_part(layer.spp_B["default"].weight).view(-1)[0] = torch.nan


CASES = {
    "sound": (nothing, []),
    "zeros": (fill_zeros, ["2", "up_proj", "zeros in the weight"]),
    "values": (change_values, ["2", "up_proj", "frozen weight"]),
    "factor": (spoil_a_factor, ["2", "layers.1.mlp.up_proj.spp_B"]),
}


def main(base: str, output: Path, case: str) -> None:
    use_cpu()
    args = arguments(output, max_steps=STEPS)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), adapter_config())
    model.load_state_dict(factors(model), strict=False)
    data = [{"input_ids": row, "labels": row} for row in token_ids(GLOBAL_BATCH)]
    change, named = CASES[case]
    guard = SPPGuardCallback(check_base_steps=1)
    trainer = Trainer(model, args, train_dataset=data, callbacks=[After(change), guard])
    try:
        trainer.train()
    except RuntimeError as error:
        assert named and all(what in str(error) for what in named), error
    else:
        assert not named, f"the run went on: {case}"
    (output / f"{case}-{torch.distributed.get_rank()}").touch()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
