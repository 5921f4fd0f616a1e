# SPDX-License-Identifier: Apache-2.0
"""Calibration data from a file of text."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from ..text_files import read_texts


def read_documents(file: Path) -> list[str]:
    """
    Read the texts of a file.

    Args:
        file (`Path`): See [`~peft_spp.text_files.read_texts`].

    Returns:
        `list[str]`: The texts that are not empty.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If the file needs `datasets`, which is not installed.
        ValueError: If it holds no text, or a row that is not as it should be; the message names the file and the line.
    """
    documents = [document for document in read_texts(file) if document.strip()]
    if not documents:
        raise ValueError(f"the calibration file {file} holds no text")
    return documents


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
