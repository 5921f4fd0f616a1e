# SPDX-License-Identifier: Apache-2.0
"""SPP's arguments of the commands that train. Their help reads them, so PEFT is imported when they are used."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from ..checkpoints.names import targets_of_peft


if TYPE_CHECKING:
    from ..tuner import SPPConfig


WITHOUT_A_FLAG = {
    "task_type": "the method of training has one",
    "peft_type": "it is SPP",
    "auto_mapping": "PEFT fills it in",
    "peft_version": "PEFT fills it in",
    "base_model_name_or_path": "--model_name_or_path",
    "revision": "--model_revision",
    "inference_mode": "it is for loading an adapter",
    "fan_in_fan_out": "the layers know how their weights are stored",
    "format_version": "it is not a setting",
}
"""The fields of [`SPPConfig`] that the command line does not have, and why."""


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
        spp_target_parameters (`list[str]`, *optional*): Names of parameters to adapt, such as fused experts.
        spp_layers_to_transform (`list[int]`, *optional*): The indices of the blocks to adapt.
        spp_layers_pattern (`list[str]`, *optional*): The names of the lists of blocks that the indices are for.
        spp_rank_pattern (`dict[str, int]`, *optional*): Other numbers of row blocks for modules, in JSON.
        spp_alpha_pattern (`dict[str, float]`, *optional*): Other alphas for modules, in JSON.
        spp_modules_to_save (`list[str]`, *optional*): Modules to train and save in full.
        spp_trainable_token_indices (`list[str]`, *optional*):
            Tokens whose embeddings to train: indices, or a JSON object from names of embeddings to lists of indices.
        spp_ensure_weight_tying (`bool`): Keep tied modules tied that are trained and saved in full.
        spp_bias (`str`): Which biases to train: 'none', 'all' or 'spp_only'.
        spp_init_weights (`str`): How to initialize the adapter: 'true', 'false' or 'positive'.
        spp_check_base (`str`): What to do if a checkpoint's adapter is for other masks: 'warn', 'error' or 'off'.
        spp_check_base_steps (`int`): After how many steps [`SPPGuardCallback`] compares the base weights.
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
    spp_target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Parameters to adapt by name, such as the fused experts of mixtures."}
    )
    spp_layers_to_transform: list[int] | None = field(
        default=None, metadata={"help": "Indices of the transformer blocks to adapt. By default, all of them."}
    )
    spp_layers_pattern: list[str] | None = field(
        default=None, metadata={"help": "The name of the list of blocks that the indices are for, such as 'layers'."}
    )
    spp_rank_pattern: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": """Other numbers of row blocks for some modules, in JSON: '{"q_proj": 8}'."""},
    )
    spp_alpha_pattern: dict[str, Any] | str | None = field(
        default=None, metadata={"help": """Other alphas for some modules, in JSON: '{"q_proj": 16}'."""}
    )
    spp_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train and save in full, in addition to the adapter."}
    )
    spp_trainable_token_indices: list[str] | None = field(
        default=None,
        metadata={
            "help": "Tokens whose embeddings to train: indices, or names of embeddings with indices in JSON: "
            """'{"embed_tokens": [0, 1]}'."""
        },
    )
    spp_ensure_weight_tying: bool = field(
        default=False,
        metadata={"help": "Keep the embedding and the head tied where one of them is trained and saved in full."},
    )
    spp_bias: Literal["none", "all", "spp_only"] = field(default="none", metadata={"help": "Which biases to train."})
    spp_init_weights: Literal["true", "false", "positive"] = field(
        default="true",
        metadata={
            "help": "How to initialize A and B: true sets B to zero, positive also takes absolute values for A, and "
            "false draws B at random, for debugging."
        },
    )
    spp_check_base: Literal["warn", "error", "off"] = field(
        default="warn",
        metadata={"help": "What to do if the adapter is later loaded onto a base model with other masks."},
    )
    spp_check_base_steps: int = field(
        default=100,
        metadata={
            "help": "How often SPPGuardCallback compares the base weights, in steps; 0 compares only when saving and "
            "at the end."
        },
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Check the arguments, data, model and checkpoint without training or writing anything."},
    )

    def to_config(self, task_type: str) -> SPPConfig:
        """The adapter's configuration. Raises a `ValueError` if a value cannot be used."""
        from ..tuner import SPPConfig

        settings: dict[str, Any] = {"task_type": task_type}
        for one in fields(SPPConfig):
            if one.name not in WITHOUT_A_FLAG:
                flag = flag_of(one.name)
                convert = _CONVERSIONS.get(one.name)
                value = getattr(self, flag)
                settings[one.name] = value if convert is None else convert(value, f"--{flag}")
        return SPPConfig(**settings)


@dataclass
class SupervisedArguments(SPPArguments):
    """
    The arguments of `peft-spp sft`.

    Args:
        teacher_model_name_or_path (`str`, *optional*):
            Learn this model's predictions of the text, usually those of the dense model that was pruned.
        teacher_model_revision (`str`, *optional*): Its revision on the Hub.
    """

    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Distill: learn the predictions of this model, usually the dense one that was pruned, instead of "
            "the text's own next tokens."
        },
    )
    teacher_model_revision: str | None = field(default=None, metadata={"help": "The teacher's revision on the Hub."})


def flag_of(setting: str) -> str:
    """The name of the argument for a field of [`SPPConfig`]."""
    return setting if setting.startswith("spp_") else f"spp_{setting}"


def _modules(values: list[str] | None, option: str) -> list[str] | str | None:
    return targets_of_peft(values, option) if values else None


def _pattern(value: Mapping[str, Any] | str | None, option: str) -> dict[str, Any]:
    # a YAML file has the mapping itself
    found = _json(value, option) if isinstance(value, str) else value or {}
    if not isinstance(found, Mapping):
        raise ValueError(f"""{option} should be a JSON object such as '{{"q_proj": 8}}', but it is {value!r}""")
    return dict(found)


def _tokens(value: Any, option: str) -> list[int] | dict[str, list[int]] | None:
    if value is None or isinstance(value, Mapping):
        return None if value is None else dict(value)
    if len(value) == 1 and isinstance(value[0], str) and value[0].lstrip().startswith(("{", "[")):
        found: Any = _json(value[0], option)
        return found
    try:
        return [int(token) for token in value]
    except ValueError as error:
        raise ValueError(f"{option} should be indices of tokens, but they are {' '.join(map(str, value))}") from error


def _json(text: str, option: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{option} is not valid JSON: {text!r}: {error}") from error


def _init_weights(value: str, option: str) -> bool | str:
    return value == "true" if value != "positive" else value


_CONVERSIONS: dict[str, Callable[[Any, str], Any]] = {
    "target_modules": _modules,
    "exclude_modules": _modules,
    "rank_pattern": _pattern,
    "alpha_pattern": _pattern,
    "trainable_token_indices": _tokens,
    "init_weights": _init_weights,
}
