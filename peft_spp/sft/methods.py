# SPDX-License-Identifier: Apache-2.0
"""The methods of TRL that have a command, an entry each. The help reads them, so TRL's classes are only named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import Any

from .spp_arguments import SPPArguments, SupervisedArguments


Flags = Mapping[str, tuple[type, str]]

_MAX_LENGTH: Flags = {"max_length": (int, "Tokens after which a row is truncated.")}
_BETA: Flags = {"beta": (float, "The weight of the divergence from the pruned model without its adapter.")}
_ONLINE: Flags = {
    "reward_funcs": (str, "Reward functions: names of TRL's functions, or import paths such as my_module.my_reward."),
    "reward_model_name_or_path": (str, "A reward model: a folder or a Hub id."),
    "num_generations": (int, "Completions to generate for each prompt."),
    "max_completion_length": (int, "Tokens after which a completion ends."),
    **_BETA,
}


@dataclass(frozen=True)
class Method:
    """A method of training, by the names of TRL's classes."""

    name: str  # the name of the command, as of TRL's
    trainer: str
    config: str  # its training arguments
    summary: str  # the first line of the command's help
    # the columns that a row may have, one of these sets. The first that the data has is trained on.
    columns: tuple[tuple[str, ...], ...]
    script: str = "trl:ScriptArguments"  # the arguments of TRL's script
    task_type: str = "CAUSAL_LM"  # the task of the adapter, as PEFT has it
    arguments: type[SPPArguments] = SPPArguments  # SPP's own arguments
    start_rate: float = 1e-3  # a learning rate to start from
    # the class that checks what is special to this method and makes its trainer
    recipe: str = f"{__package__}.recipe:Recipe"
    # flags of TRL for the command's help, in addition to those of all methods
    often_set: Flags = field(default_factory=dict)

    @property
    def command(self) -> str:
        """The command as a user writes it."""
        return f"peft-spp {self.name}"


_PREFERENCES = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))

METHODS = {
    method.name: method
    for method in (
        Method(
            "sft",
            "trl:SFTTrainer",
            "trl:SFTConfig",
            "Fine-tune a model with SPP and TRL's `SFTTrainer`.",
            # and the text column, which has any name
            columns=(("input_ids",), ("prompt", "completion"), ("messages",), ("conversations",)),
            arguments=SupervisedArguments,
            start_rate=4e-3,
            recipe=f"{__package__}.supervised:Supervised",
            often_set={**_MAX_LENGTH, "packing": (bool, "Fill sequences with several rows each.")},
        ),
        Method(
            "dpo",
            "trl:DPOTrainer",
            "trl:DPOConfig",
            "Train on preferences with SPP and TRL's `DPOTrainer`.",
            columns=_PREFERENCES,
            often_set={**_MAX_LENGTH, **_BETA},
        ),
        Method(
            "reward",
            "trl:RewardTrainer",
            "trl:RewardConfig",
            "Train a reward model with SPP and TRL's `RewardTrainer`.",
            columns=(("chosen_ids", "rejected_ids"), *_PREFERENCES),
            task_type="SEQ_CLS",
            often_set=_MAX_LENGTH,
        ),
        Method(
            "kto",
            "trl:KTOTrainer",
            "trl:KTOConfig",
            "Train on labeled completions with SPP and TRL's `KTOTrainer`.",
            columns=(("prompt", "completion", "label"), *_PREFERENCES),
            often_set={**_MAX_LENGTH, **_BETA},
        ),
        Method(
            "grpo",
            "trl:GRPOTrainer",
            "trl:GRPOConfig",
            "Train on rewards with SPP and TRL's `GRPOTrainer`.",
            columns=(("prompt",),),
            script="trl.scripts.grpo:GRPOScriptArguments",
            recipe=f"{__package__}.rewards:WithRewards",
            often_set=_ONLINE,
        ),
        Method(
            "rloo",
            "trl:RLOOTrainer",
            "trl:RLOOConfig",
            "Train on rewards with SPP and TRL's `RLOOTrainer`.",
            columns=(("prompt",),),
            script="trl.scripts.rloo:RLOOScriptArguments",
            recipe=f"{__package__}.rewards:WithRewards",
            often_set=_ONLINE,
        ),
    )
}
"""All methods, by their names."""


def load(name: str) -> Any:
    """The class that a method names, imported when it is needed."""
    return resolve_name(name)
