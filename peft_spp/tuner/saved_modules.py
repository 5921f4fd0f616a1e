# SPDX-License-Identifier: Apache-2.0
"""A check that what an adapter has trained beside its factors is in its file, before a model is changed for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import peft
from packaging.version import Version
from peft import TaskType
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


if TYPE_CHECKING:
    from .config import SPPConfig


SAVES_BIASES = Version("0.21")
"""The first PEFT that saves the biases which other adapters than LoRA's train."""

_TOKENS = "token_adapter.trainable_tokens_delta"


class SavedNames(NamedTuple):
    """
    The names of what is in an adapter's file.

    Args:
        file (`Path`): The weights.
        names (`frozenset[str]`): The names of the tensors in it.
    """

    file: Path
    names: frozenset[str]


def heads_saved_whole(config: SPPConfig) -> list[str]:
    """
    The heads that PEFT adds to `modules_to_save` for a task after the adapter has been injected.

    For sequence classification it does so before, and the heads are not adapted; the other tasks should not differ.

    Args:
        config (`SPPConfig`): The configuration of the adapter.

    Returns:
        `list[str]`: Their names that `modules_to_save` lacks.
    """
    names = {TaskType.TOKEN_CLS: ["classifier", "score"], TaskType.QUESTION_ANS: ["qa_outputs"]}
    heads = names.get(config.task_type, [])  # type: ignore[arg-type]
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


def check_saved_modules(model: nn.Module, config: SPPConfig) -> None:
    """
    Check that the file of an adapter has the weights of all modules that the adapter is to replace.

    Args:
        model (`nn.Module`): The base model.
        config (`SPPConfig`): The configuration of the adapter. One that is not of a saved adapter is not checked.

    Raises:
        ValueError: If weights of `modules_to_save` or `trainable_token_indices` are missing; the message names the
            file and the module.
    """
    saved = config.saved_names
    if saved is None:
        return
    if config.trainable_token_indices and not any(name.endswith(_TOKENS) for name in saved.names):
        raise ValueError(
            f"{saved.file} has no weights of the tokens that `trainable_token_indices` names. Save the adapter again, "
            "load an earlier checkpoint of it, or remove `trainable_token_indices` from its configuration."
        )
    expected: dict[str, list[str]] = {}
    for module_name, tensor in _to_save(model, config.modules_to_save or []):
        # what comes before may be named otherwise in the file: PEFT renames where the model has been restructured
        expected.setdefault(f"{module_name.rpartition('.')[2]}.{tensor}", []).append(f"{module_name}.{tensor}")
    for ending, tensors in expected.items():
        found = [name for name in saved.names if name.endswith(f".{ending}")]
        if len(found) < len(tensors):
            missing = next(name for name in tensors if not any(one.endswith(f".{name}") for one in found))
            raise ValueError(
                f"{saved.file} lacks {missing}, of a module that `modules_to_save` of the adapter names. Save the "
                "adapter again, load an earlier checkpoint of it, or remove the module from `modules_to_save` in its "
                "configuration."
            )


def _to_save(model: nn.Module, names: list[str]) -> Iterator[tuple[str, str]]:
    """The modules that PEFT will replace, and their tensors."""
    for module_name, module in model.named_modules():
        if module_name.endswith(tuple(names)):
            whole = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module
            yield from ((module_name, tensor) for tensor in whole.state_dict())


def check_bias_is_saved(config: SPPConfig) -> None:
    """
    Refuse to train biases that the installed PEFT would leave out when it saves the adapter.

    Before 0.21 PEFT saves biases of LoRA's relatives alone.

    Args:
        config (`SPPConfig`): The configuration of a new adapter.

    Raises:
        ValueError: If biases are to be trained that would not be saved.
    """
    if config.bias != "none" and not config.inference_mode and Version(peft.__version__) < SAVES_BIASES:
        raise ValueError(
            f"PEFT {peft.__version__} does not save the biases that `bias={config.bias!r}` trains, so they would be "
            f"lost. Use bias='none', or update PEFT to {SAVES_BIASES} or newer."
        )
