# SPDX-License-Identifier: Apache-2.0
"""The data of `peft-spp sft`, prepared by TRL itself for a model without weights: what fails there fails the run."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.compute
from datasets import Dataset  # type: ignore[import-untyped]
from jinja2 import TemplateError
from peft import PeftModel
from torch import nn
from trl import SFTConfig, SFTTrainer

from ..error_text import one_line
from .errors import InputError
from .model import BaseModel


_POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings)$")


def rehearse(model: BaseModel, training: SFTConfig, train_dataset: Any, eval_dataset: Any | None) -> None:
    """
    Let `SFTTrainer` prepare all data and check its arguments, before the weights of the model are loaded.

    `datasets` caches what was prepared from files, where the run itself finds it.
    """
    _check_tokenizer(model, training, next(iter(train_dataset)))
    template = training.chat_template_path
    if template is not None and not (Path(template).is_file() and template.endswith((".jinja", ".j2"))):
        return  # the template of another model, with which come new tokens and a larger embedding
    adapted: Any = model.adapted
    # where the model lies: the trainer does not move a model that is placed already
    adapted.hf_device_map = {"": "meta"}
    with TemporaryDirectory() as folder:
        try:
            trainer = SFTTrainer(
                model=adapted,
                args=_without_effects(training, folder),
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=copy.deepcopy(model.processor),
            )
        except (ValueError, TypeError, KeyError, ImportError, RuntimeError, TemplateError) as error:
            raise InputError(f"TRL cannot train with these arguments and data: {one_line(error)}") from error
    for name, prepared in (("train", trainer.train_dataset), ("eval", trainer.eval_dataset)):
        if isinstance(prepared, Dataset):
            _check_prepared(name, prepared, model.adapted, trainer.processing_class, training)


def _without_effects(training: SFTConfig, folder: str) -> SFTConfig:
    """The training arguments without what writes to a folder or the Hub, or needs weights."""
    args = copy.copy(training)
    args.output_dir = folder
    args.push_to_hub = args.activation_offloading = False
    return args


def _check_tokenizer(model: BaseModel, training: SFTConfig, row: dict[str, Any]) -> None:
    tokenizer = model.tokenizer
    if "input_ids" in row:
        return
    is_chat = any(isinstance(row.get(name), list) for name in ("messages", "conversations", "prompt"))
    if is_chat and training.chat_template_path is None and not tokenizer.chat_template:
        raise InputError(
            "The data is conversational, but the model's tokenizer has no chat template. Pass --chat_template_path "
            "with a Jinja file or a model that has one, or use data with a text column."
        )
    if not is_chat and training.eos_token is None and tokenizer.eos_token is None:
        raise InputError(
            "The model's tokenizer has no end-of-text token to end each text with. Pass --eos_token with a token of "
            "its vocabulary."
        )


def _check_prepared(name: str, prepared: Dataset, model: PeftModel, processor: Any, training: SFTConfig) -> None:
    if not len(prepared):
        raise InputError(
            f"No rows of the data to {name} on are left after preparation: every row is empty, or has nothing to "
            f"learn in its first {training.max_length} tokens (--max_length)."
        )
    if "input_ids" not in prepared.column_names:
        return  # it was not to be prepared
    # ZeRO-3 leaves no rows in the weight itself
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    positions = _positions(model)
    tokenizer = getattr(processor, "tokenizer", processor)
    # batches are filled up with the padding token
    largest, longest = tokenizer.pad_token_id, 0
    for batch in prepared.select_columns(["input_ids"]).with_format("arrow").iter(10_000):
        ids = batch["input_ids"]
        largest = max(largest, pyarrow.compute.max(pyarrow.compute.list_flatten(ids)).as_py() or 0)
        longest = max(longest, pyarrow.compute.max(pyarrow.compute.list_value_length(ids)).as_py() or 0)
    if rows is not None and largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise InputError(
            f"The tokenizer produces token {largest} ({token!r}) for the data, but the model has embeddings for only "
            f"{rows} tokens. Use the tokenizer that the model was trained with, or resize the model's embeddings."
        )
    if positions is not None and longest > positions:
        raise InputError(
            f"The data to {name} on has sequences of {longest} tokens, but the model has only {positions} positions. "
            f"Pass --max_length {positions}."
        )


def _positions(model: nn.Module) -> int | None:
    """How long a sequence may be for a model that has learned an embedding of each position."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _POSITIONS.search(name):
            # some reserve rows in front (`offset` of OPT and BART)
            return module.num_embeddings - int(getattr(module, "offset", 0))
    return None
