# SPDX-License-Identifier: Apache-2.0
"""What a model says of the adapters that were merged into it, so that none is merged into it twice.

It stands in `config.json`, which Transformers keeps: it survives copying, loading and saving again, and more training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


MERGED = "merged_spp_adapters"
"""The key of `config.json` under which a model lists the ids of its merged adapters."""

Factor = tuple[str, float, Tensor, Tensor]
"""The name of a module, its scaling, A and B."""


# An adapter that was saved again in one of them still has the digits of that one.
_ROUNDED = (torch.bfloat16, torch.float16)
_DIGITS = 16


def adapter_id(factors: Iterable[Factor]) -> str:
    """What identifies an adapter by its weights, whatever folder it is in."""
    parts = [[_digest(*factor, dtype) for dtype in _ROUNDED] for factor in factors]
    # independent of the order, which files and models do not share
    digests = [sorted(one) for one in zip(*parts, strict=True)] or [[] for _ in _ROUNDED]
    return "".join(hashlib.sha256(b"".join(one)).hexdigest()[:_DIGITS] for one in digests)


def _digest(name: str, scaling: float, A: Tensor, B: Tensor, dtype: torch.dtype) -> bytes:
    digest = hashlib.sha256(f"{name} {scaling!r} {tuple(A.shape)}".encode())
    for factor in (A, B):
        digest.update(factor.detach().to("cpu", dtype).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.digest()


def is_merged(identity: str, config: Mapping[str, Any]) -> bool:
    """Whether a model lists an adapter, as it is or as it was before it was saved in bfloat16 or float16."""
    return any(
        listed[place : place + _DIGITS] == identity[place : place + _DIGITS]
        for listed in merged_adapters(config)
        for place in range(0, len(identity), _DIGITS)
    )


def merged_adapters(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The ids of the adapters that were merged into a model, as far as its list can be read."""
    listed = config.get(MERGED)
    return tuple(one for one in listed if isinstance(one, str)) if isinstance(listed, (list, tuple)) else ()
