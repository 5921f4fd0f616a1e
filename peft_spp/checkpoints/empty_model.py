# SPDX-License-Identifier: Apache-2.0
"""The model of a checkpoint without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


def empty_model(folder: Path, config: Mapping[str, Any]) -> PreTrainedModel:
    """Make the model that a `config.json` names, on the meta device; a `KeyError` if Transformers does not know it."""
    named = config.get("architectures") or []
    cls = next((cls for name in named if (cls := getattr(transformers, str(name), None)) is not None), None)
    # without the question on the terminal whether the model's code may be run
    loaded = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(loaded) if cls is None else cls(loaded)
    return cast(PreTrainedModel, model)
