# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning: a text column of any name, and a teacher."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from trl import SFTConfig

from .errors import InputError
from .model import BaseModel
from .recipe import Recipe
from .spp_arguments import SupervisedArguments
from .teacher import DistillationSFTTrainer, check_teacher, load_teacher


class Supervised(Recipe):
    """`peft-spp sft`."""

    @property
    def _training(self) -> SFTConfig:
        return cast(SFTConfig, self.arguments.training)

    @property
    def _teacher(self) -> tuple[str | None, str | None]:
        spp = cast(SupervisedArguments, self.arguments.spp)
        return spp.teacher_model_name_or_path, spp.teacher_model_revision

    def check_model(self, model: BaseModel) -> None:
        name, revision = self._teacher
        if name:
            check_teacher(name, self._training, model.empty.config, revision)

    def check_data(self, row: dict[str, Any]) -> None:
        if "labels" not in row or not self.columns:
            return
        labels = row["labels"]
        if "input_ids" not in row or not isinstance(labels, list) or len(labels) != len(row["input_ids"]):
            raise InputError(
                "The data has a column 'labels', which TRL takes for a label of each token of 'input_ids'. Rename or "
                "remove it."
            )

    @property
    def columns(self) -> tuple[tuple[str, ...], ...]:
        given = self._training.dataset_kwargs
        if isinstance(given, dict) and given.get("skip_prepare_dataset"):
            return ()
        return *super().columns, (self._training.dataset_text_field,)

    @property
    def needs(self) -> str:
        return (
            f"{self._training.dataset_text_field!r} (or another name, with --dataset_text_field), 'messages', "
            "'prompt' and 'completion', or 'input_ids'"
        )

    @property
    def lines(self) -> list[str]:
        name, _ = self._teacher
        return [f"Teacher:    {name}"] if name else []

    def trainer_class(self) -> Any:
        name, revision = self._teacher
        if not name:
            return super().trainer_class()
        training, model = self._training, self.arguments.model
        settings = {"trust_remote_code": training.trust_remote_code, "attn_implementation": model.attn_implementation}
        settings |= {"dtype": cast(dict[str, Any], training.model_init_kwargs)["dtype"]}
        return partial(DistillationSFTTrainer, teacher=load_teacher(name, revision, settings))
