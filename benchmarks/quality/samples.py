# SPDX-License-Identifier: Apache-2.0
"""Text that a dense model writes itself: what a pruned copy of it can be tuned on where there is no other text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from peft_spp.durable import write_text


BATCH = 32
OPENINGS = ("<|endoftext|>", "<|im_start|>user\n")
"""What batches of samples begin with, in turn: a document, and a question to an assistant, which is then answered."""


def sampled_blocks(
    model: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerBase, count: int, size: int, path: Path
) -> torch.Tensor:
    """
    Blocks of tokens drawn from a model at temperature 1 (nucleus 0.95); kept in a file batch by batch.

    Args:
        model (`Callable[[], PreTrainedModel]`): Loads the model; called only if blocks are missing.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        count (`int`): The number of blocks.
        size (`int`): The tokens in a block, with the opening.
        path (`Path`): The file of the blocks, JSON.

    Returns:
        `torch.Tensor`: The tokens, of shape (count, size).
    """
    blocks = json.loads(path.read_text()) if path.is_file() else []
    if len(blocks) < count:
        loaded = model()
    while len(blocks) < count:
        number = len(blocks) // BATCH
        opening = tokenizer(OPENINGS[number % len(OPENINGS)], add_special_tokens=False)["input_ids"]
        blocks += _sample(loaded, opening, size, seed=number)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(blocks))
    return torch.tensor(blocks[:count])


def _sample(model: PreTrainedModel, opening: list[int], size: int, seed: int) -> list[list[int]]:
    set_seed(seed)
    ids = torch.tensor([opening] * BATCH, device=model.device)
    # no end: after the end of a document or of a turn the model begins the next
    cast(Any, model.generation_config).eos_token_id = None
    more = size - len(opening)
    output = cast(Any, model).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=1.0,
        top_p=0.95,
        top_k=0,
        max_new_tokens=more,
        min_new_tokens=more,
        pad_token_id=0,
    )
    return cast(list[list[int]], output.tolist())
