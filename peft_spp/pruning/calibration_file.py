# SPDX-License-Identifier: Apache-2.0
"""Calibration data from a file of text."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase


TEXT_FIELD = "text"
"""The field of a JSON line that holds its text."""


def read_documents(file: Path) -> list[str]:
    """
    Read the texts of a file.

    Args:
        file (`Path`): JSON lines (`.jsonl`, `.json`), each an object with a `"text"`, or plain text in UTF-8.

    Returns:
        `list[str]`: The texts that are not empty; a file of plain text is one.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no text, or a line that is not as it should be; the message names it.
    """
    if not file.is_file():
        raise FileNotFoundError(f"the calibration file {file} is not there")
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the calibration file {file} is not text in UTF-8: {error}") from error
    if file.suffix not in (".jsonl", ".json"):
        documents = [content]
    else:
        documents = [_text_of(line, file, number) for number, line in enumerate(content.splitlines(), 1) if line]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ValueError(f"the calibration file {file} holds no text")
    return documents


def _text_of(line: str, file: Path, number: int) -> str:
    try:
        text = json.loads(line)[TEXT_FIELD]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f'line {number} of the calibration file {file} is not a JSON object such as {{"{TEXT_FIELD}": "..."}}'
        ) from error
    if not isinstance(text, str):
        raise ValueError(f"line {number} of the calibration file {file} has a {TEXT_FIELD!r} that is no string")
    return text


def calibration_sequences(
    file: Path, tokenizer: PreTrainedTokenizerBase, samples: int, sequence_length: int, seed: int
) -> list[torch.Tensor]:
    """
    Draw sequences of tokens from a file.

    The documents are tokenized, closed with the end-of-text token if the tokenizer has one, put one behind another,
    and cut into sequences; of these, some are drawn.

    Args:
        file (`Path`): See [`read_documents`].
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        samples (`int`): How many sequences to draw.
        sequence_length (`int`): The tokens in each.
        seed (`int`): Seed of the draw.

    Returns:
        `list[torch.Tensor]`: Token ids, each of shape `(1, sequence_length)`.

    Raises:
        ValueError: If there is too little text; the message says how much there is.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # without the warning that a document is longer than the model's context: it is cut
    encoded = tokenizer(read_documents(file), add_special_tokens=False, verbose=False)["input_ids"]
    ids = torch.tensor([token for document in encoded for token in (*document, *end)])
    available = len(ids) // sequence_length
    if available < samples:
        raise ValueError(
            f"the calibration file {file} has {len(ids):,} tokens, enough for {available} sequences of "
            f"{sequence_length:,}, and samples={samples} are asked for: give more text, or lower samples or "
            "sequence_length"
        )
    drawn = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:samples]
    return [ids[None, start : start + sequence_length] for start in (drawn * sequence_length).tolist()]
