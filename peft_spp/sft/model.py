# SPDX-License-Identifier: Apache-2.0
"""The base model of a run, checked by its configuration alone."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import transformers
from peft import get_peft_model
from peft.utils.constants import CONFIG_NAME as ADAPTER_CONFIG_NAME
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoProcessor,
    PretrainedConfig,
    PreTrainedModel,
)
from trl import ModelConfig

from ..checkpoints.hub import local_folder
from ..checkpoints.safetensors_files import stored_in_files
from ..error_text import one_line
from ..tuner import SPPConfig, SPPLayer
from .errors import InputError
from .machine import check_quantization


# what is read of a model before its weights
_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken")


class BaseModel(NamedTuple):
    """A base model without its weights."""

    empty: PreTrainedModel  # the model on the meta device
    processor: Any  # its tokenizer, or the processor of a multimodal model
    layers: list[str]  # the names of the layers that are adapted
    trainable: int  # how many parameters are trained
    total: int  # how many parameters there are, those of the adapter among them

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, also where a processor holds it."""
        return getattr(self.processor, "tokenizer", self.processor)


def check_model(model: ModelConfig, config: SPPConfig, trust_remote_code: bool) -> BaseModel:
    """Check that the base model is there and that it can be adapted, without its weights."""
    name = str(model.model_name_or_path)
    if (Path(name) / ADAPTER_CONFIG_NAME).is_file():
        raise InputError(
            f"{name!r} is an adapter, not a model. Merge it first (`peft-spp merge`), or name its base model and pass "
            "--resume_from_checkpoint to train it further."
        )
    source = {"revision": model.model_revision, "trust_remote_code": trust_remote_code}
    try:
        # Transformers would ask the Hub again and again for what is not there
        local_folder(name, revision=model.model_revision, allow=_SMALL_FILES)
        model_config = AutoConfig.from_pretrained(name, **source)
    except (OSError, ValueError) as error:
        raise InputError(f"The model {name!r} cannot be loaded: {one_line(error)}") from error
    try:
        # as TRL does, once it has loaded the model
        processor = AutoProcessor.from_pretrained(name, **source)
    except (OSError, ValueError) as error:
        raise InputError(f"The tokenizer of {name!r} cannot be loaded: {one_line(error)}") from error
    check_quantization(model, model_config)
    scores = config.task_type == "SEQ_CLS"
    empty = _build_empty(model, model_config, trust_remote_code, scores)
    if not scores and not empty.can_generate():
        raise InputError(f"The model {name!r} is a {type(empty).__name__}, which does not generate text.")
    _check_tokens(config, empty)
    try:
        adapted = get_peft_model(empty, config, low_cpu_mem_usage=True)
    except ValueError as error:
        raise InputError(f"The model {name!r} cannot be adapted: {one_line(error)}") from error
    check_weights(name)
    layers = [module.module_name for module in adapted.modules() if isinstance(module, SPPLayer)]
    trainable, total = adapted.get_nb_trainable_parameters()
    return BaseModel(cast(PreTrainedModel, adapted.unload()), processor, layers, trainable, total)


def _check_tokens(config: SPPConfig, model: PreTrainedModel) -> None:
    """Check that the tokens to train are in the model's vocabulary."""
    indices = config.trainable_token_indices or []
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    for token in indices if isinstance(indices, list) else [one for some in indices.values() for one in some]:
        if token < 0 or (rows is not None and isinstance(indices, list) and token >= rows):
            raise InputError(
                f"--spp_trainable_token_indices names token {token}. Tokens are counted from 0"
                + (f", and the model has embeddings for {rows}." if rows is not None else ".")
            )


def check_weights(name: str) -> None:
    """Check that the files of a local model are there and whole, by their headers."""
    folder = Path(name).expanduser()
    # what is pickled is read by nobody before the run
    if not folder.is_dir() or (any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors*"))):
        return
    try:
        _, tensors, _ = stored_in_files(folder)
        deque(tensors, maxlen=0)
    except (OSError, ValueError) as error:
        raise InputError(f"The weights of {name!r} cannot be loaded: {one_line(error)}") from error


def model_class(config: PretrainedConfig) -> Any:
    """The class that a configuration names, or the automatic one where Transformers does not have it."""
    name = (config.architectures or ["AutoModelForCausalLM"])[0]
    return getattr(transformers, name, None) or AutoModelForCausalLM


def _build_empty(
    model: ModelConfig, config: PretrainedConfig, trust_remote_code: bool, scores: bool
) -> PreTrainedModel:
    if model.attn_implementation is not None:
        config._attn_implementation = model.attn_implementation
    if scores:
        config.num_labels = 1  # as RewardTrainer has it
    architecture = AutoModelForSequenceClassification if scores else model_class(config)
    try:
        with torch.device("meta"):
            if hasattr(architecture, "from_config"):
                return cast(PreTrainedModel, architecture.from_config(config, trust_remote_code=trust_remote_code))
            return cast(PreTrainedModel, architecture(config))
    except (ImportError, ValueError) as error:
        raise InputError(f"The model {model.model_name_or_path!r} cannot be built: {one_line(error)}") from error
