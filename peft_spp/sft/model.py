# SPDX-License-Identifier: Apache-2.0
"""The base model of `peft-spp sft`, checked by its configuration alone."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from peft import get_peft_model
from peft.utils.constants import CONFIG_NAME as ADAPTER_CONFIG_NAME
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, PreTrainedModel
from trl import ModelConfig

from ..tuner import SPPConfig, SPPLayer
from .errors import InputError, one_line


class AdapterSize(NamedTuple):
    """How many layers an adapter has, and how many parameters it trains, of how many in all."""

    layers: int
    trainable: int
    total: int


def check_model(model: ModelConfig, config: SPPConfig, trust_remote_code: bool) -> AdapterSize:
    """
    Check that the base model is there and that it can be adapted, without its weights.

    Args:
        model (`ModelConfig`): The arguments that name the model.
        config (`SPPConfig`): The adapter's configuration.
        trust_remote_code (`bool`): Whether code that comes with the model may be run.

    Returns:
        `AdapterSize`: The size of the adapter.

    Raises:
        InputError: If the model cannot be found or the adapter does not fit it.
    """
    name = str(model.model_name_or_path)
    if (Path(name) / ADAPTER_CONFIG_NAME).is_file():
        raise InputError(
            f"{name!r} is an adapter, not a model. Merge it first (`peft-spp merge`), or name its base model and pass "
            "--resume_from_checkpoint to train it further."
        )
    source = {"revision": model.model_revision, "trust_remote_code": trust_remote_code}
    try:
        model_config = AutoConfig.from_pretrained(name, **source)
    except (OSError, ValueError) as error:
        raise InputError(f"The model {name!r} cannot be loaded: {one_line(error)}") from error
    try:
        # as SFTTrainer does, once it has loaded the model
        AutoProcessor.from_pretrained(name, **source)
    except (OSError, ValueError) as error:
        raise InputError(f"The tokenizer of {name!r} cannot be loaded: {one_line(error)}") from error

    architecture = getattr(transformers, (model_config.architectures or ["AutoModelForCausalLM"])[0], None)
    with torch.device("meta"):
        if architecture is None or architecture is AutoModelForCausalLM:
            empty = AutoModelForCausalLM.from_config(model_config, trust_remote_code=trust_remote_code)
        else:
            empty = architecture(model_config)
    if not empty.can_generate():
        raise InputError(f"The model {name!r} is a {type(empty).__name__}, which does not generate text.")
    return _adapt(empty, config, name)


def _adapt(empty: PreTrainedModel, config: SPPConfig, name: str) -> AdapterSize:
    try:
        adapted = get_peft_model(empty, config, low_cpu_mem_usage=True)
    except ValueError as error:
        raise InputError(f"The model {name!r} cannot be adapted: {one_line(error)}") from error
    layers = sum(isinstance(module, SPPLayer) for module in adapted.modules())
    return AdapterSize(layers, *adapted.get_nb_trainable_parameters())
