# SPDX-License-Identifier: Apache-2.0
"""What is measured of a model: loss per token, sparsity, answers to problems."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from peft_spp.sparsity import compare_sparsity, sparsity_report

from .data import Problem
from .design import Pruning


BATCH = 16
BATCH_TOKENS = 2048
"""At most so many sequences and tokens in a batch: the scores of a token for 50,000 words take 200 kB."""


@torch.no_grad()
def loss_per_token(model: nn.Module, blocks: torch.Tensor, device: torch.device) -> float:
    """
    The mean of the negative log-likelihood over all tokens that are predicted; its exponential is the perplexity.

    Args:
        model (`nn.Module`): A causal language model on the device.
        blocks (`torch.Tensor`): Token ids of shape (blocks, tokens); each block stands alone.
        device (`torch.device`): The device.

    Returns:
        `float`: The mean; infinite if a loss is not finite.
    """
    model.eval()
    total = 0.0
    for batch in blocks.split(max(1, min(BATCH, BATCH_TOKENS // blocks.shape[1]))):
        ids = batch.to(device)
        # every block predicts the same number of tokens
        total += model(input_ids=ids, labels=ids).loss.double().item() * len(ids)
    mean = total / len(blocks)
    return mean if math.isfinite(mean) else math.inf


def sparsity_measures(pruned: Path | str, saved: Path, pruning: Pruning) -> dict[str, Any]:
    """
    How sparse a saved model is, and whether it kept what pruning had set to zero.

    Args:
        pruned (`Path` or `str`): The folder of the pruned model.
        saved (`Path`): The folder of what was made of it.
        pruning (`Pruning`): What pattern to look for.

    Returns:
        `dict[str, Any]`: `sparsity`; `zeros_lost`; `pattern_kept`, `None` for unstructured sparsity.
    """
    report = sparsity_report(saved) if pruning.pattern is None else sparsity_report(saved, patterns=pruning.pattern)
    comparison = compare_sparsity(pruned, saved)
    return {
        "sparsity": report.total_sparsity,
        "zeros_lost": comparison.lost if comparison.complete else None,
        "pattern_kept": None if pruning.pattern is None else report.all_satisfy(pruning.pattern),
    }


def final_number(text: str) -> str | None:
    """The result of an answer in GSM8K's form, after `####`, without commas, a dollar sign and a final full stop."""
    match = re.search(r"####\s*\$?(-?[\d,]*\.?\d+)", text)
    if match is None:
        return None
    number = match[1].replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


@torch.no_grad()
def exact_match(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    device: torch.device,
    new_tokens: int = 256,
) -> float:
    """
    The share of problems whose result is right, by greedy decoding.

    Args:
        model (`PreTrainedModel`): The model, on the device.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        problems (`Sequence[Problem]`): The problems.
        device (`torch.device`): The device.
        new_tokens (`int`): The most tokens of an answer.
    """
    model.eval()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    right = 0
    for start in range(0, len(problems), BATCH):
        some = problems[start : start + BATCH]
        inputs = tokenizer([one.prompt for one in some], return_tensors="pt", padding=True, padding_side="left")
        inputs = {name: inputs[name].to(device) for name in ("input_ids", "attention_mask")}
        output = model.generate(
            **inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for problem, answer in zip(some, answers, strict=True):
            number = final_number(answer)
            right += number is not None and number == final_number(problem.answer)
    return right / len(problems)
