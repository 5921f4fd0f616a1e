# SPDX-License-Identifier: Apache-2.0
"""Training on completions that the model writes: the rewards for them."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from peft import PeftConfig
from peft.utils.constants import CONFIG_NAME as ADAPTER_CONFIG_NAME
from transformers import AutoConfig
from trl import rewards

from ..checkpoints.hub import local_folder
from ..error_text import one_line
from .errors import InputError
from .recipe import Recipe


_WITH_MATH_VERIFY = ("accuracy_reward", "reasoning_accuracy_reward")
# these read the last message of a conversation
_OF_MESSAGES = (*_WITH_MATH_VERIFY, "think_format_reward")
_OVERLONG = "get_soft_overlong_punishment"
# what TRL passes to a function, next to the columns of the data
_PASSED = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}
Reward = Callable[..., Any]


class WithRewards(Recipe):
    """`peft-spp grpo` and `peft-spp rloo`."""

    def check(self) -> None:
        script: Any = self.arguments.script
        training: Any = self.arguments.training
        self._functions = [(name, _reward_function(name)) for name in script.reward_funcs or ()]
        if not self._functions and not script.reward_model_name_or_path:
            raise InputError(
                "Training needs a reward. Pass --reward_funcs with names of TRL's reward functions or import paths, "
                "or --reward_model_name_or_path with a folder or a Hub id."
            )
        if script.reward_model_name_or_path:
            self._check_reward_model(str(script.reward_model_name_or_path))
        if training.use_vllm and find_spec("vllm") is None:
            raise InputError("--use_vllm needs the package vllm, which is not installed. Leave out the flag.")

    def _check_reward_model(self, name: str) -> None:
        # TRL loads it with the settings of the model that is trained
        training: Any = self.arguments.training
        source = {"revision": self.arguments.model.model_revision, "trust_remote_code": training.trust_remote_code}
        try:
            folder = local_folder(name, revision=source["revision"], allow=("*.json", "*.py"))
            scores = True
            if (folder / ADAPTER_CONFIG_NAME).is_file():
                # Transformers loads its base model, and the adapter with its head
                adapter = PeftConfig.from_pretrained(str(folder))
                scores = adapter.task_type == "SEQ_CLS"
                AutoConfig.from_pretrained(str(adapter.base_model_name_or_path), **source)
            else:
                config = AutoConfig.from_pretrained(name, **source)
                scores = not any(architecture.endswith("ForCausalLM") for architecture in config.architectures or ())
        except (OSError, ValueError) as error:
            raise InputError(f"The reward model {name!r} cannot be loaded: {one_line(error)}") from error
        if not scores:
            raise InputError(
                f"{name!r} has no head that scores text, so its rewards would be random. Train a reward model with "
                "`peft-spp reward`, or name another."
            )

    def check_data(self, row: dict[str, Any]) -> None:
        for name, function in self._functions:
            missing = sorted(_columns_of(function) - row.keys())
            if missing:
                raise InputError(
                    f"The reward function {name!r} takes {', '.join(map(repr, missing))}, and the data has only the "
                    f"columns {', '.join(map(repr, row))}. Use data that has all of them, or another reward."
                )
            if name in _OF_MESSAGES and not isinstance(row.get("prompt"), list):
                raise InputError(
                    f"The reward function {name!r} is for conversations, and the 'prompt' of the data is text. Use "
                    "prompts that are lists of messages, or another reward."
                )

    def trainer_arguments(self) -> dict[str, Any]:
        model = self.arguments.script.reward_model_name_or_path  # type: ignore[attr-defined]
        return {"reward_funcs": [*([str(model)] if model else []), *(function for _, function in self._functions)]}

    def rehearsal_arguments(self) -> dict[str, Any]:
        # TRL loads a model that is named
        given = self.trainer_arguments()["reward_funcs"]
        return {"reward_funcs": [_no_reward if isinstance(reward, str) else reward for reward in given]}


def _no_reward(completions: list[Any], **_: Any) -> list[float]:
    return [0.0] * len(completions)


def _reward_function(name: str) -> Reward:
    """A reward function by its name, as the scripts of TRL find it."""
    if name in _WITH_MATH_VERIFY and find_spec("math_verify") is None:
        raise InputError(f"The reward function {name!r} needs math-verify: pip install math-verify")
    if name in _OF_MESSAGES:
        named: Reward = getattr(rewards, name)
        return named
    if name == _OVERLONG:
        return rewards.get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256)
    module, _, attribute = name.rpartition(".")
    if not module:
        raise InputError(
            f"There is no reward function {name!r}. Pass {', '.join((*_OF_MESSAGES, _OVERLONG))}, or an import path "
            "such as my_module.my_reward."
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function: Reward = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"The reward function {name!r} cannot be imported: {one_line(error)}") from error
    if not callable(function):
        raise InputError(f"The reward function {name!r} is a {type(function).__name__}, which cannot be called.")
    return function


def _columns_of(function: Reward) -> set[str]:
    """The columns of the data that a reward function cannot be called without."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return set()  # it does not say what it takes
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {one.name for one in parameters if one.kind in named and one.default is one.empty} - _PASSED
