# SPDX-License-Identifier: Apache-2.0
"""What the task of an adapter asks of a model: a head that is trained as a whole, or one that generates."""

from __future__ import annotations

from typing import Any

from peft import TaskType
from torch import nn

from .config import SPPConfig


def heads_saved_whole(config: SPPConfig) -> list[str]:
    """
    The heads that PEFT adds to `modules_to_save` for a task after the adapter has been injected.

    For sequence classification it does so before, and the heads are not adapted; the other tasks should not differ.

    Args:
        config (`SPPConfig`): The configuration of the adapter.

    Returns:
        `list[str]`: Their names that `modules_to_save` lacks.
    """
    names: dict[Any, list[str]] = {TaskType.TOKEN_CLS: ["classifier", "score"], TaskType.QUESTION_ANS: ["qa_outputs"]}
    heads = names.get(config.task_type, [])
    return [name for name in heads if name not in (config.modules_to_save or [])]


def check_task(model: nn.Module, config: SPPConfig) -> None:
    """
    Check that a model can be wrapped for the task of an adapter, before the adapter is injected.

    Args:
        model (`nn.Module`): The base model.
        config (`SPPConfig`): The configuration of the adapter.

    Raises:
        AttributeError: If the task is to generate, and the model has no head for it.
    """
    generates = config.task_type in (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM)
    if generates and not hasattr(model, "prepare_inputs_for_generation"):
        raise AttributeError(
            f"{type(model).__name__} has no `prepare_inputs_for_generation`, which `task_type={config.task_type!s}` "
            "needs. Load the model with the head of a language model, or leave `task_type` out."
        )
