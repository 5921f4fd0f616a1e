# SPDX-License-Identifier: Apache-2.0
"""Whether this machine can do what the arguments of a run ask for."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_token
from transformers import PretrainedConfig, TrainingArguments
from transformers.quantizers import AutoHfQuantizer
from trl import ModelConfig, get_quantization_config

from ..error_text import one_line
from .errors import InputError


def check_machine(training: TrainingArguments) -> None:
    """Check the device, the precision and the output folder."""
    if training.fp16 and training.device.type == "cpu":
        raise InputError("--fp16 needs a GPU, and this run is on the CPU. Pass --fp16 false.")
    check_output(Path(str(training.output_dir)))
    if training.push_to_hub and not (training.hub_token or get_token()):
        raise InputError("--push_to_hub needs a Hub token. Run `hf auth login`, or set HF_TOKEN.")


def check_output(folder: Path) -> None:
    """Check that a folder can be written to, without making it."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not place.is_dir():
        raise InputError(f"--output_dir {str(folder)!r} cannot be created: {place} is not a folder.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"--output_dir {str(folder)!r} cannot be written to: no permission for {place}.")


def check_apart(output: str, sources: Iterable[str | None]) -> None:
    """Check that the adapter does not go into the folder of a model, which would load with it from then on."""
    for source in sources:
        folder = Path(source or "").expanduser()
        if source is not None and folder.is_dir() and folder.resolve() == Path(output).expanduser().resolve():
            raise InputError(f"--output_dir {output!r} is the folder of the model {source!r}. Name another folder.")


def no_gpu_hint(error: BaseException) -> str | None:
    """What to pass instead where Transformers refuses bfloat16, which TRL turns on by default."""
    if "bf16" not in str(error) or "use_cpu" not in str(error):
        return None
    if torch.cuda.is_available():
        return "This GPU cannot train in bfloat16, which is the default. Pass --bf16 false."
    return "PyTorch does not find a GPU. Pass --use_cpu to train on the CPU, and --bf16 false to train in float32."


def check_quantization(model: ModelConfig, config: PretrainedConfig) -> None:
    """
    Check that the packages are there for a model that is quantized, or that is to be quantized while it is loaded.
    """
    stored = getattr(config, "quantization_config", None)
    flag = "--load_in_4bit" if model.load_in_4bit else "--load_in_8bit" if model.load_in_8bit else None
    if stored is None and flag is None:
        return
    try:
        wanted: Any = stored if stored is not None else get_quantization_config(model)
        AutoHfQuantizer.from_config(wanted, pre_quantized=stored is not None).validate_environment()
    except (ImportError, ValueError, RuntimeError) as error:
        what = f"{flag} cannot be used" if stored is None else "The quantized model cannot be loaded"
        raise InputError(f"{what}: {one_line(error)}") from error
