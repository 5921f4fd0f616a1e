# SPDX-License-Identifier: Apache-2.0
"""Calibration data from a file of text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..architecture import context_length
from ..text_files import read_texts


SAMPLES = 128
SEQUENCE_LENGTH = 2048


def read_documents(file: Path) -> list[str]:
    if file.is_dir():
        raise ValueError(f"the calibration file {file} is a folder: pass a file of text")
    documents = [document for document in read_texts(file) if document.strip()]
    if not documents:
        raise ValueError(f"the calibration file {file} contains no text")
    return documents


def calibration_sequences(
    file: Path, tokenizer: PreTrainedTokenizerBase, samples: int, sequence_length: int, seed: int
) -> list[torch.Tensor]:
    """
    Draw sequences of tokens from a file.

    The documents are tokenized, closed with the end-of-text token if the tokenizer has one, put one behind another,
    and cut into sequences; of these, some are drawn.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # without the warning that a document is longer than the model's context: it is cut
    encoded = tokenizer(read_documents(file), add_special_tokens=False, verbose=False)["input_ids"]
    ids = torch.tensor([token for document in encoded for token in (*document, *end)])
    available = len(ids) // sequence_length
    if available < samples:
        raise ValueError(
            f"the calibration file {file} has {len(ids):,} tokens, enough for {available} sequences of "
            f"{sequence_length:,}, but samples={samples}: provide more text, or lower samples (--samples) or "
            "sequence_length (--sequence-length)"
        )
    drawn = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:samples]
    return [ids[None, start : start + sequence_length] for start in (drawn * sequence_length).tolist()]


def calibration_from_file(
    file: str | os.PathLike[str],
    folder: Path,
    model: PreTrainedModel,
    samples: int,
    sequence_length: int | None,
    seed: int,
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """
    Draw the calibration data for a model, whose tokenizer is in a folder, from a file. It returns token ids, each of
    shape `(1, sequence_length)`, and the settings.
    """
    limit = context_length(model)
    if sequence_length is None:
        sequence_length = SEQUENCE_LENGTH if limit is None else min(SEQUENCE_LENGTH, limit)
    if samples < 1 or sequence_length < 1:
        raise ValueError(
            f"samples and sequence_length should be positive but the values passed are {samples} and {sequence_length}"
        )
    if limit is not None and sequence_length > limit:
        raise ValueError(f"sequence_length={sequence_length} exceeds the model's context of {limit} tokens")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the tokenizer of {folder} cannot be loaded ({error}): save the tokenizer there, or pass batches of "
            "token ids as calibration"
        ) from error
    path = Path(file).expanduser()
    data = calibration_sequences(path, tokenizer, samples, sequence_length, seed)
    return data, {"calibration": path.name, "samples": samples, "sequence_length": sequence_length, "seed": seed}
