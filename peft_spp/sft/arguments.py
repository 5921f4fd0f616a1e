# SPDX-License-Identifier: Apache-2.0
"""The arguments of `peft-spp sft`: TRL's, and SPP's next to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import yaml  # type: ignore[import-untyped]
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

from ..checkpoints.names import names_or_expression
from ..error_text import one_line
from ..tuner import SPPConfig
from .errors import InputError
from .machine import no_gpu_hint


@dataclass
class SPPArguments:
    """
    The SPP adapter, as [`SPPConfig`] takes it, and how to run.

    Args:
        spp_r (`int`): The number of row blocks.
        spp_alpha (`float`): The update is scaled by `spp_alpha / spp_r`.
        spp_dropout (`float`): The dropout probability on the input of the SPP branch.
        spp_target_modules (`list[str]`, *optional*):
            Names of the modules to adapt, or one regular expression, or 'all-linear'. By default every linear layer
            inside the transformer blocks.
        spp_exclude_modules (`list[str]`, *optional*): Names of modules to leave alone, or one regular expression.
        spp_layers_to_transform (`list[int]`, *optional*): The indices of the blocks to adapt.
        spp_modules_to_save (`list[str]`, *optional*): Modules to train and save in full.
        spp_bias (`str`): Which biases to train: 'none', 'all' or 'spp_only'.
        spp_check_base_steps (`int`): After how many steps [`SPPGuardCallback`] compares the base weights.
        teacher_model_name_or_path (`str`, *optional*):
            Learn this model's predictions of the text, usually those of the dense model that was pruned.
        teacher_model_revision (`str`, *optional*): Its revision on the Hub.
        dry_run (`bool`): Check arguments, data, model and checkpoint, and write nothing.
    """

    spp_r: int = field(default=16, metadata={"help": "SPP's number of row blocks."})
    spp_alpha: float = field(default=32, metadata={"help": "SPP alpha: the update is scaled by spp_alpha / spp_r."})
    spp_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the SPP branch."})
    spp_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules to adapt: names, one regular expression, or 'all-linear'. By default, every linear layer "
            "inside the transformer blocks."
        },
    )
    spp_exclude_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules to exclude: names, or one regular expression."}
    )
    spp_layers_to_transform: list[int] | None = field(
        default=None, metadata={"help": "Indices of the transformer blocks to adapt. By default, all of them."}
    )
    spp_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train and save in full, in addition to the adapter."}
    )
    spp_bias: Literal["none", "all", "spp_only"] = field(default="none", metadata={"help": "Which biases to train."})
    spp_check_base_steps: int = field(
        default=100,
        metadata={
            "help": "How often SPPGuardCallback compares the base weights, in steps; 0 compares only when saving."
        },
    )
    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Distill: learn the predictions of this model, usually the dense one that was pruned, instead of "
            "the text's own next tokens."
        },
    )
    teacher_model_revision: str | None = field(default=None, metadata={"help": "The teacher's revision on the Hub."})
    dry_run: bool = field(
        default=False,
        metadata={"help": "Check the arguments, data, model and checkpoint without training or writing anything."},
    )

    def to_config(self) -> SPPConfig:
        """The adapter's configuration. Raises a `ValueError` if a value cannot be used."""
        return SPPConfig(
            task_type="CAUSAL_LM",
            r=self.spp_r,
            spp_alpha=self.spp_alpha,
            spp_dropout=self.spp_dropout,
            target_modules=_modules(self.spp_target_modules, "--spp_target_modules"),
            exclude_modules=_modules(self.spp_exclude_modules, "--spp_exclude_modules"),
            layers_to_transform=self.spp_layers_to_transform,
            modules_to_save=self.spp_modules_to_save,
            bias=self.spp_bias,
        )


class Arguments(NamedTuple):
    """All arguments of a run."""

    script: ScriptArguments
    training: SFTConfig
    model: ModelConfig
    mixture: DatasetMixtureConfig
    spp: SPPArguments


def parse_arguments(args: Sequence[str], prog: str) -> Arguments:
    """Read arguments from a command line and from the YAML file that its `--config` names."""
    types: list[Any] = [ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig, SPPArguments]
    parser = TrlParser(types, prog=prog)
    parser.add_argument(
        "--config", metavar="FILE", help="A YAML file with arguments. Arguments on the command line override it."
    )
    words = _split_config_option(args)
    if "--config" in words and words.index("--config") == len(words) - 1:
        raise InputError("--config needs the path of a YAML file.")
    try:
        # the last is the namespace of --config, which TrlParser has taken out of the words by then
        *parsed, _ = parser.parse_args_and_config(words)
    except (OSError, ValueError, TypeError, ImportError, yaml.YAMLError) as error:
        raise InputError(no_gpu_hint(error) or one_line(error)) from error
    arguments = Arguments(*parsed)
    _check(arguments)
    return arguments


def _check(arguments: Arguments) -> None:
    _refuse_lora(arguments.model)
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
    if arguments.spp.spp_check_base_steps < 0:
        raise InputError("--spp_check_base_steps should be a number of steps, or 0.")
    try:
        arguments.spp.to_config()
    except ValueError as error:
        raise InputError(f"The SPP arguments are not valid: {one_line(error)}") from error


def _refuse_lora(model: ModelConfig) -> None:
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
            "--spp_, such as --spp_r. Use `trl sft` to train a LoRA adapter."
        )


def _split_config_option(args: Sequence[str]) -> list[str]:
    # TrlParser knows `--config FILE` alone
    words: list[str] = []
    for word in args:
        words.extend(("--config", word.removeprefix("--config=")) if word.startswith("--config=") else (word,))
    return words


def _modules(values: list[str] | None, option: str) -> list[str] | str | None:
    if values == ["all-linear"]:
        return values[0]
    return names_or_expression(values, option) if values else None
