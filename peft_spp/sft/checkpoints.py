# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint of a training run to go on from, if the run may have been killed while it wrote one."""

from __future__ import annotations

import json
import pickle
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from peft.utils.constants import CONFIG_NAME
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..checkpoints.safetensors_files import read_json
from ..tuner import SPPConfig
from ..tuner.adapter_files import find_weights, named_adapters
from ..tuner.saved_adapter import read_adapter
from .errors import InputError
from .processes import is_first_process
from .spp_arguments import flag_of


# what cannot change in the midst of a run, and what neither PEFT nor TRL adds to
_SAME = ("r", "spp_alpha", "rank_pattern", "alpha_pattern", "bias")

_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """
    The checkpoint of the highest step that was written to its end.

    `Trainer.train(resume_from_checkpoint=True)` takes the one of the highest step, and fails if the run was killed in
    the midst of writing it.

    Args:
        output_dir (`str` or `Path`): The `output_dir` of the `Trainer`.

    Returns:
        `str`, *optional*: The folder, for `Trainer.train(resume_from_checkpoint=...)`; `None`, with which training
        begins at the first step, if there is no complete checkpoint.
    """
    root = Path(output_dir)
    if not root.is_dir():
        return None
    steps = {int(match[1]): path for path in root.iterdir() if (match := _NAME.fullmatch(path.name))}
    for step in sorted(steps, reverse=True):
        if incompleteness(steps[step]) is None:
            return str(steps[step])
    return None


def incompleteness(checkpoint: Path) -> str | None:
    """
    Why training cannot resume from a checkpoint.

    `Trainer` writes its state last, so that a file which is missing or truncated shows a run that was killed. The
    other files are looked at too, as the order of writing does not hold for a machine that lost power.
    """
    if not checkpoint.is_dir():
        return "the folder does not exist"
    state = checkpoint / TRAINER_STATE_NAME
    try:
        step = json.loads(state.read_text(encoding="utf-8"))["global_step"]
    except FileNotFoundError:
        return f"{TRAINER_STATE_NAME}, which is written last, is missing"
    except (ValueError, KeyError, TypeError):
        return f"{TRAINER_STATE_NAME} is truncated"
    match = _NAME.fullmatch(checkpoint.name)
    if match and step != int(match[1]):
        return f"{TRAINER_STATE_NAME} belongs to step {step}"
    named = named_adapters(checkpoint)
    folders = [checkpoint, *named] if find_weights(checkpoint) or (checkpoint / CONFIG_NAME).is_file() else named
    for folder in folders or [checkpoint]:
        try:
            read_adapter(folder, pickled=True)
        except FileNotFoundError:
            return "it has no adapter" if folder == checkpoint else f"its adapter {folder.name!r} has no weights"
        except ValueError as error:
            return str(error)
    # torch.save writes zip archives, whose directory comes at the end
    for path in sorted((*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth"))):
        if not zipfile.is_zipfile(path):
            return f"{path.name} is truncated"
    return None


def check_settings(checkpoint: str, config: SPPConfig) -> None:
    """Check that the adapter of a checkpoint has the settings of a run, before the model is loaded."""
    file = Path(checkpoint) / CONFIG_NAME
    saved = read_json(file) if file.is_file() else {}
    for name in _SAME:
        own, other = getattr(config, name), saved.get(name)
        if name not in saved or (own or None) == (other or None):
            continue
        raise InputError(
            f"Cannot resume from the checkpoint {checkpoint!r}: its adapter has --{flag_of(name)} {other}, and this "
            f"run {own}. Pass what the checkpoint has, or train into another --output_dir without "
            "--resume_from_checkpoint."
        )


def find_checkpoint(request: str | bool | None, output_dir: str | Path) -> str | None:
    """The checkpoint that `--resume_from_checkpoint` asks for; in a YAML file, `true` and `false` are bools."""
    request = str(request or "false")
    word = request.lower()
    if word == "false":
        return None
    if word in ("true", "auto"):
        found = last_complete_checkpoint(output_dir)
        if found is None and word == "true":
            raise InputError(
                f"There is no complete checkpoint in {str(output_dir)!r} to resume from. Leave out "
                "--resume_from_checkpoint, or pass 'auto' to start from scratch if there is none."
            )
        return found
    lack = incompleteness(Path(request))
    if lack is not None:
        raise InputError(
            f"Cannot resume from the checkpoint {request!r}: {lack}. Pass 'true' to resume from the last complete one."
        )
    return request


def rate_of(checkpoint: str) -> float | None:
    """The learning rate of a checkpoint, which a resumed run keeps; `None` if it is not in there."""
    try:
        scheduler: dict[str, Any] = torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True)
        return float(scheduler["base_lrs"][0])
    except (OSError, RuntimeError, pickle.UnpicklingError, LookupError, TypeError):
        return None


class AllStepsDone(Exception):
    """The checkpoint that a run goes on from has all of its steps."""


class StopWhenDone(TrainerCallback):
    """Raises [`AllStepsDone`] before a step is made: Transformers would make one more than `max_steps`."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= state.max_steps:
            if is_first_process():
                print(f"The checkpoint has all {state.max_steps} steps: none is left to train.", file=sys.stderr)
            raise AllStepsDone
