# SPDX-License-Identifier: Apache-2.0
"""SPP's arguments of `peft-spp sft`. The command's help reads them, so PEFT is imported when they are used."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ..checkpoints.names import names_or_expression


if TYPE_CHECKING:
    from ..tuner import SPPConfig


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
        from ..tuner import SPPConfig

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


def _modules(values: list[str] | None, option: str) -> list[str] | str | None:
    if values == ["all-linear"]:
        return values[0]
    return names_or_expression(values, option) if values else None
