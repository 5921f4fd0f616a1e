# SPDX-License-Identifier: Apache-2.0
"""The data of a run, prepared by TRL itself for a model without weights: what fails there fails the run."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.compute
from datasets import Dataset  # type: ignore[import-untyped]
from jinja2 import TemplateError
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, TrainingArguments

from ..error_text import one_line
from .errors import InputError
from .methods import load
from .model import BaseModel
from .recipe import Recipe


_POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings)$")


def rehearse(recipe: Recipe, model: BaseModel, train_dataset: Any, eval_dataset: Any | None) -> list[str]:
    """
    Let the trainer prepare all data and check its arguments, before the weights of the model are loaded.

    `datasets` caches what was prepared from files, where the run itself finds it. It returns warnings for the header.
    """
    method, training = recipe.arguments.method, recipe.arguments.training
    _check_tokenizer(model, training, next(iter(train_dataset)))
    template = getattr(training, "chat_template_path", None)
    if template is not None and not Path(template).is_file():
        return []  # the template of another model, with which come new tokens and a larger embedding
    empty: Any = model.empty
    # where the model lies: the trainer does not move a model that is placed already
    empty.hf_device_map = {"": "meta"}
    # a model that scores text has a tokenizer alone
    processor = model.tokenizer if method.task_type == "SEQ_CLS" else model.processor
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        # said when the adapter was checked
        warnings.filterwarnings("ignore", message="These layers have fewer output rows")
        try:
            trainer = load(method.trainer)(
                model=empty,
                args=_without_effects(training, folder),
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=copy.deepcopy(processor),
                peft_config=recipe.arguments.spp.to_config(method.task_type),
                **recipe.rehearsal_arguments(),
            )
        except _CANNOT_TRAIN as error:
            raise InputError(f"TRL cannot train with these arguments and data: {one_line(error)}") from error
    warned = []
    parts: dict[str, tuple[Any, Any]] = {
        "train": (train_dataset, trainer.train_dataset),
        "eval": (eval_dataset, trainer.eval_dataset),
    }
    for name, (given, prepared) in parts.items():
        if isinstance(prepared, Dataset):
            _check_prepared(name, prepared, empty, trainer.processing_class, training)
            if len(prepared) < len(given) and not getattr(training, "packing", False):
                warned.append(
                    f"Warning: {len(given) - len(prepared)} of {len(given)} rows to {name} on are left out, as they "
                    f"are empty or leave nothing to learn within --max_length {getattr(training, 'max_length', None)}."
                )
    return warned


# what TRL, Transformers and templates raise of arguments and data that do not go together
_CANNOT_TRAIN = (ValueError, TypeError, LookupError, ArithmeticError, ImportError, RuntimeError, TemplateError)

# what writes to a folder or the Hub, handles signals or needs weights, and what is for loading them
_EFFECTS = {
    "push_to_hub": False,
    "activation_offloading": False,
    "enable_jit_checkpoint": False,
    "precompute_ref_log_probs": False,
    "use_vllm": False,
    "model_init_kwargs": None,
}


def _without_effects(training: TrainingArguments, folder: str) -> TrainingArguments:
    args = copy.copy(training)
    args.output_dir = folder
    for name, without in _EFFECTS.items():
        if hasattr(args, name):
            setattr(args, name, without)
    return args


def _check_tokenizer(model: BaseModel, training: TrainingArguments, row: dict[str, Any]) -> None:
    tokenizer = model.tokenizer
    if any(name in row for name in ("input_ids", "chosen_ids")):
        return
    template: str | None = getattr(training, "chat_template_path", None)
    if template is not None:
        _check_template(template, getattr(training, "trust_remote_code", False))
    is_chat = any(isinstance(row.get(name), list) for name in _TEXTS)
    if is_chat and template is None and not tokenizer.chat_template:
        fix = (
            "Pass --chat_template_path with a Jinja file or a model that has one"
            if hasattr(training, "chat_template_path")
            else "Save the tokenizer with one"
        )
        raise InputError(
            f"The data is conversational, but the model's tokenizer has no chat template. {fix}, or use data that is "
            "text."
        )
    if not is_chat and getattr(training, "eos_token", None) is None and tokenizer.eos_token is None:
        fix = (
            "Pass --eos_token with a token of its vocabulary."
            if hasattr(training, "eos_token")
            else "Save the tokenizer with an `eos_token` of its vocabulary."
        )
        raise InputError(f"The model's tokenizer has no end-of-text token to end each text with. {fix}")


def _check_template(template: str, trust_remote_code: bool) -> None:
    """Check that there is a chat template in a file, or in a model, as TRL tells them apart."""
    is_file = Path(template).is_file()
    if is_file or template.endswith((".jinja", ".jinja2", ".j2")):
        if not is_file:
            raise InputError(f"--chat_template_path {template!r} is not a file.")
        if not template.endswith((".jinja", ".j2")):
            raise InputError(f"--chat_template_path {template!r}: the name of a file should end with .jinja or .j2.")
        return
    try:
        found = AutoTokenizer.from_pretrained(template, trust_remote_code=trust_remote_code).chat_template
    except (OSError, ValueError) as error:
        raise InputError(f"--chat_template_path {template!r} cannot be loaded: {one_line(error)}") from error
    if not found:
        raise InputError(f"--chat_template_path {template!r} is a model without a chat template.")


_TEXTS = ("messages", "conversations", "prompt", "chosen")
# tokens that TRL makes of a row: a text, or a prompt and what follows it
_PROMPT, _OTHERS = "prompt_ids", ("input_ids", "chosen_ids", "rejected_ids", "completion_ids")


def _check_prepared(
    name: str, prepared: Dataset, model: PreTrainedModel, processor: Any, training: TrainingArguments
) -> None:
    limit: int | None = getattr(training, "max_length", None)
    if not len(prepared):
        raise InputError(
            f"No rows of the data to {name} on are left after preparation: every row is empty, or has nothing to "
            f"learn in its first {limit} tokens (--max_length)."
        )
    columns = [column for column in (_PROMPT, *_OTHERS) if column in prepared.column_names]
    if not columns:
        return  # it is prepared while training, or was not to be
    # ZeRO-3 leaves no rows in the weight itself
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    positions = _positions(model)
    tokenizer = getattr(processor, "tokenizer", processor)
    # batches are filled up with the padding token
    smallest, largest, longest = 0, tokenizer.pad_token_id, 0
    labels = ["labels"] if {"labels", "input_ids"} <= set(prepared.column_names) else []
    for batch in prepared.select_columns(columns + labels).with_format("arrow").iter(10_000):
        for column in labels:
            # those of a large list are of another type
            counts = [pyarrow.compute.list_value_length(batch[one]).cast("int64") for one in (column, "input_ids")]
            if not counts[0].equals(counts[1]):
                raise InputError(f"The data to {name} on has rows with other numbers of 'labels' than of 'input_ids'.")
        for column in columns:
            ids = batch[column]
            ends = pyarrow.compute.min_max(pyarrow.compute.list_flatten(ids)).as_py()
            smallest, largest = min(smallest, ends["min"] or 0), max(largest, ends["max"] or 0)
            lengths = pyarrow.compute.list_value_length(ids)
            if _PROMPT in columns and column != _PROMPT:
                lengths = pyarrow.compute.add(lengths, pyarrow.compute.list_value_length(batch[_PROMPT]))
            longest = max(longest, pyarrow.compute.max(lengths).as_py() or 0)
    if _PROMPT in columns and limit is not None:
        longest = min(longest, limit)  # truncated while training
    if smallest < 0:
        raise InputError(f"The data to {name} on has token {smallest}. Tokens are counted from 0.")
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
