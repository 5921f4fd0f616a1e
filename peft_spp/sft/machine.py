# SPDX-License-Identifier: Apache-2.0
"""Whether this machine can do what the arguments of a run ask for."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_token
from transformers import PretrainedConfig, TrainingArguments
from transformers.quantizers import AutoHfQuantizer
from trl import ModelConfig, get_quantization_config

from ..checkpoints.output import check_utf8
from ..durable import OUT_OF_SPACE
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
    try:
        check_utf8(folder.absolute())
        if not os.path.lexists(folder):
            folder.lstat()  # a name that is too long for the file system
    except (FileNotFoundError, NotADirectoryError):
        pass  # what is below names it
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--output_dir {str(folder)!r} cannot be created: {reason}.") from error
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not place.is_dir():
        raise InputError(f"--output_dir {str(folder)!r} cannot be created: {place} is not a folder.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"--output_dir {str(folder)!r} cannot be written to: no permission for {place}.")


@contextmanager
def errors_of_the_disk(folder: Path) -> Iterator[None]:
    """While active, an error of a full disk that does not say where it is gets the name of a folder."""
    try:
        yield
    except OSError as error:
        if error.errno not in OUT_OF_SPACE or error.filename is not None:
            raise
        raise _not_written(os.strerror(error.errno), folder) from error
    except RuntimeError as error:
        # of `torch.save`, which does not know what the system said
        if not re.search(r"PytorchStreamWriter failed|inline_container\.cc.* unexpected pos", str(error)):
            raise
        raise _not_written("PyTorch could not write a file (is the disk full?)", folder) from error


def _not_written(reason: str, folder: Path) -> OSError:
    return OSError(
        f"--output_dir {str(folder)!r} could not be written to: {reason}. Free space, and pass "
        "--resume_from_checkpoint auto to go on from the last complete checkpoint."
    )


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
