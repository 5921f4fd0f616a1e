# SPDX-License-Identifier: Apache-2.0
"""The arguments of a command that trains: TRL's, and SPP's next to them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml  # type: ignore[import-untyped]
from transformers import TrainingArguments
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

from ..error_text import one_line
from .errors import InputError
from .machine import no_gpu_hint
from .methods import Method, load
from .parser import Parser
from .spp_arguments import SPPArguments


class Arguments(NamedTuple):
    """All arguments of a run. `training` is of the class that the method names, and so is `script`."""

    method: Method
    script: ScriptArguments
    training: TrainingArguments
    model: ModelConfig
    mixture: DatasetMixtureConfig
    spp: SPPArguments


def parse_arguments(args: Sequence[str], method: Method) -> Arguments:
    """Read arguments from a command line and from the YAML file that its `--config` names."""
    types: list[Any] = [load(method.script), load(method.config), ModelConfig, DatasetMixtureConfig, method.arguments]
    parser = Parser(types, prog=method.command)
    parser.add_argument(
        "--config", metavar="FILE", help="A YAML file with arguments. Arguments on the command line override it."
    )
    words = _split_config_option(args)
    file = next(iter(words[words.index("--config") + 1 :]), None) if "--config" in words else ""
    if file is None:
        raise InputError("--config needs the path of a YAML file.")
    try:
        # TrlParser has taken the first --config out of the words
        *parsed, rest = parser.parse_args_and_config(words)
    except UnicodeDecodeError as error:
        raise InputError(f"The YAML file {file} is not text in UTF-8: {error}") from error
    except (OSError, ValueError, TypeError, ArithmeticError, ImportError, yaml.YAMLError) as error:
        raise InputError(no_gpu_hint(error) or one_line(error)) from error
    if rest.config is not None:
        raise InputError(f"--config {rest.config} would not be read. Pass one YAML file, with --config in full.")
    arguments = Arguments(method, *parsed)
    _check(arguments)
    return arguments


def _check(arguments: Arguments) -> None:
    _refuse_lora(arguments.model, arguments.method)
    script, mixture = arguments.script, arguments.mixture
    if not arguments.model.model_name_or_path:
        raise InputError("No model is named. Pass --model_name_or_path with a folder or a Hub id.")
    if bool(script.dataset_name) is bool(mixture.datasets):
        found = "Both are" if script.dataset_name else "None is"
        raise InputError(
            "Pass one source of data: --dataset_name with a file, a folder or a Hub id, or `datasets` in the YAML "
            f"file. {found} given."
        )
    if (script.dataset_streaming or mixture.streaming) and arguments.training.max_steps <= 0:
        raise InputError("Streamed data has no length. Pass --max_steps.")
    for name in (
        "gradient_accumulation_steps",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "max_length",
    ):
        if (value := getattr(arguments.training, name, None)) is not None and value < 1:
            raise InputError(f"--{name} {value} cannot be used: it should be 1 or more.")
    training = arguments.training
    if training.max_steps == 0 or (training.max_steps < 0 and training.num_train_epochs <= 0):
        raise InputError(
            f"--max_steps {training.max_steps} and --num_train_epochs {training.num_train_epochs:g} train nothing."
        )
    if not 0 <= (rate := arguments.training.learning_rate) < math.inf:
        raise InputError(f"--learning_rate {rate} cannot be used: it should be a number, 0 or more.")
    if arguments.spp.spp_check_base_steps < 0:
        raise InputError("--spp_check_base_steps should be a number of steps, or 0.")
    try:
        arguments.spp.to_config(arguments.method.task_type)
    except ValueError as error:
        raise InputError(f"The SPP arguments are not valid: {one_line(error)}") from error


def _refuse_lora(model: ModelConfig, method: Method) -> None:
    """TRL's flags for LoRA would be without effect."""
    set_flags = [
        f"--{f.name}"
        for f in dataclasses.fields(ModelConfig)
        if (f.name.startswith("lora_") or f.name in ("use_peft", "use_rslora", "use_dora"))
        and getattr(model, f.name) != f.default
    ]
    if set_flags:
        raise InputError(
            f"{', '.join(set_flags)}: only for LoRA. This command trains an SPP adapter; its flags begin with "
            f"--spp_, such as --spp_r. Use `trl {method.name}` to train a LoRA adapter."
        )


def _split_config_option(args: Sequence[str]) -> list[str]:
    # TrlParser knows `--config FILE` alone
    words: list[str] = []
    for word in args:
        words.extend(("--config", word.removeprefix("--config=")) if word.startswith("--config=") else (word,))
    return words
