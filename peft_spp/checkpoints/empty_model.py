# SPDX-License-Identifier: Apache-2.0
"""The model of a checkpoint without its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
    if dtype is not None:
        _set_dtype(loaded, dtype)
    with default_dtype(dtype or torch.get_default_dtype()), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(loaded) if cls is None else cls(loaded)
    return cast(PreTrainedModel, model)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """A context in which floating-point tensors, and so the parameters of new models, have this dtype by default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _set_dtype(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    # the auto classes, which also make the parts of a model, take the dtype of a configuration
    config.dtype = dtype
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            _set_dtype(part, dtype)
