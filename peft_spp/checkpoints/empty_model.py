# SPDX-License-Identifier: Apache-2.0
"""The model of a checkpoint without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


def empty_model(folder: Path, config: Mapping[str, Any], dtype: torch.dtype | None = None) -> PreTrainedModel:
    """
    Make the model that a `config.json` names, on the meta device; a `KeyError` if Transformers does not know it.

    A dtype is for all of its parts; by default they have PyTorch's, or that of the configuration.
    """
    named = config.get("architectures") or []
    cls = next((cls for name in named if (cls := getattr(transformers, str(name), None)) is not None), None)
    # without the question on the terminal whether the model's code may be run
    loaded = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    before = torch.get_default_dtype()
    if dtype is not None:
        _set_dtype(loaded, dtype)
        torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(loaded) if cls is None else cls(loaded)
    finally:
        torch.set_default_dtype(before)
    return cast(PreTrainedModel, model)


def _set_dtype(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    # the auto classes, which also make the parts of a model, take the dtype of a configuration
    config.dtype = dtype
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            _set_dtype(part, dtype)
