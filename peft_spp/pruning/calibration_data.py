# SPDX-License-Identifier: Apache-2.0
"""Calibration batches as the model is called with them: without padding, labels and caches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache


# Nothing is learned from the labels here, so the loss need not be computed.
_UNUSED = ("labels", "use_cache")

_CACHES = ("past_key_values", "past_key_value", "cache_params", "mems", "state")


@dataclass(frozen=True)
class CalibrationInputs:
    """Keyword arguments of a model's forward, for sequences without padding."""

    arguments: dict[str, Any]
    # the arguments of the batch that the sequences were cut from, where padding precedes them: the model may count
    # positions from the start of the padding
    padded: dict[str, Any] | None = None
    rows: list[int] = field(default_factory=list)  # which sequences of that batch they are
    columns: slice = field(default_factory=lambda: slice(None))  # which of its tokens


def calibration_inputs(
    batches: Iterable[torch.Tensor | Mapping[str, Any]],
) -> Iterator[CalibrationInputs]:
    """
    Prepare calibration batches for the model, cutting off their padding.

    Cutting is exact whatever a layer does to the shape of its inputs. Counting only some rows of them is not: layers
    get tokens flattened, split into heads, or routed to experts.
    """
    # a tensor of three dimensions is batches, one behind another
    if isinstance(batches, Mapping) or (isinstance(batches, torch.Tensor) and batches.ndim < 3):
        raise ValueError(
            f"calibration_batches is a {type(batches).__name__}, a single batch: pass a list of batches, such as "
            "[batch]."
        )
    number, empty = 0, True
    for number, batch in enumerate(batches, 1):
        if not isinstance(batch, (torch.Tensor, Mapping)):
            raise ValueError(
                f"Calibration batch {number} is a {type(batch).__name__}. Pass a tensor of token ids of shape (batch, "
                "tokens), or keyword arguments of the model's forward, such as tokenizer(text, return_tensors='pt')."
            )
        arguments = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
        _check_token_ids(number, arguments.get("input_ids"))
        arguments = {name: value for name, value in arguments.items() if name not in _UNUSED}
        for name, value in arguments.items():
            if isinstance(value, Cache) or (name in _CACHES and value is not None):
                raise ValueError(
                    f"Calibration batch {number} contains {name}. Pass whole sequences without it: no state is kept "
                    "between batches."
                )
        for inputs in _without_padding(number, arguments):
            empty = False
            yield inputs
    if not number:
        raise ValueError("There is no calibration data: calibration_batches is empty.")
    if empty:
        raise ValueError("There is no calibration data: attention_mask marks all tokens as padding.")


def _check_token_ids(number: int, ids: Any) -> None:
    if ids is not None and not (isinstance(ids, torch.Tensor) and ids.ndim > 1):
        what = f"shape {tuple(ids.shape)}" if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise ValueError(
            f"input_ids of calibration batch {number} ({what}) should be a tensor of shape (batch, tokens): pass "
            "return_tensors='pt' to the tokenizer, or input_ids[None] for a single sequence."
        )


def _without_padding(number: int, arguments: dict[str, Any]) -> Iterator[CalibrationInputs]:
    mask = arguments.get("attention_mask")
    if mask is None:
        if all(value.numel() for value in arguments.values() if isinstance(value, torch.Tensor)):
            yield CalibrationInputs(arguments)
        return
    real = _real_tokens(number, mask, arguments)
    if real.all() and real.numel():
        yield CalibrationInputs(arguments)
        return
    for (start, stop), rows in _spans(number, real).items():
        columns = slice(start, stop)
        cut = {name: _cut(number, name, value, tuple(real.shape), rows, columns) for name, value in arguments.items()}
        yield CalibrationInputs(cut, arguments if start else None, rows, columns)


def _real_tokens(number: int, mask: Any, arguments: dict[str, Any]) -> torch.Tensor:
    """The attention mask as booleans of shape `(batch, tokens)`."""
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or not ((mask == 0) | (mask == 1)).all():
        what = f"shape {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask of calibration batch {number} ({what}) does not mark which tokens are padding. Pass a "
            "mask of shape (batch, tokens) with 1 for tokens and 0 for padding, or sequences without padding."
        )
    for name in ("input_ids", "inputs_embeds"):
        tokens = arguments.get(name)
        if tokens is not None and tokens.shape[:2] != mask.shape:
            raise ValueError(
                f"attention_mask of calibration batch {number} has shape {tuple(mask.shape)}, and {name} has "
                f"{tuple(tokens.shape)}: they must have the same (batch, tokens)."
            )
    return mask != 0


def _spans(number: int, real: torch.Tensor) -> dict[tuple[int, int], list[int]]:
    """The sequences with tokens, by the first of their tokens and the one after the last."""
    spans: dict[tuple[int, int], list[int]] = {}
    for row, tokens in enumerate(real):
        places = tokens.nonzero().flatten().tolist()
        if not places:
            continue
        start, stop = places[0], places[-1] + 1
        if stop - start != len(places):
            raise ValueError(
                f"attention_mask of calibration batch {number} has padding between the tokens of sequence {row}. "
                "Pad at an end, or pass sequences without padding."
            )
        spans.setdefault((start, stop), []).append(row)
    return spans


def _cut(number: int, name: str, value: Any, shape: tuple[int, ...], rows: list[int], columns: slice) -> Any:
    """What an argument of a batch with `shape` (sequences, tokens) is for some of its sequences, without padding."""
    all_rows = len(rows) == shape[0]
    if not isinstance(value, torch.Tensor):
        if all_rows or value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise _indivisible(number, name, type(value).__name__)
    if value.shape[:2] == shape and value.ndim <= 3:
        return value[rows, columns]
    if name == "position_ids" and value.shape == (1, shape[1]):
        return value[:, columns]
    if name == "position_ids" and value.ndim == 3 and value.shape[1:] == shape:
        return value[:, rows, columns]
    if all_rows and (value.ndim == 0 or shape[1] not in value.shape):
        return value
    raise _indivisible(number, name, f"shape {tuple(value.shape)}")


def _indivisible(number: int, name: str, what: str) -> ValueError:
    return ValueError(
        f"Calibration batch {number} has padding, and its {name} ({what}) cannot be split into sequences. Pass "
        "batches of one sequence each, without padding."
    )
