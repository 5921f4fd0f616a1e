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


def adapter_id(factors: Iterable[Factor]) -> str:
    """What identifies an adapter by its weights, whatever folder it is in, and if it was saved in bfloat16 since.

    Args:
        factors (`Iterable[Factor]`): The factors of all modules; a generator holds those of one in memory.

    Returns:
        `str`: 32 hexadecimal digits, the same for the same updates.
    """
    # independent of the order, which files and models do not share
    parts = sorted(_digest(*factor) for factor in factors)
    return hashlib.sha256(b"".join(parts)).hexdigest()[:32]


def _digest(name: str, scaling: float, A: Tensor, B: Tensor) -> bytes:
    digest = hashlib.sha256(f"{name} {scaling!r} {tuple(A.shape)}".encode())
    for factor in (A, B):
        values = factor.detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.digest()


def merged_adapters(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The ids of the adapters that were merged into a model.

    Args:
        config (`Mapping[str, Any]`): The content of its `config.json`.

    Returns:
        `tuple[str, ...]`: The ids, as far as the list can be read.
    """
    listed = config.get(MERGED)
    return tuple(one for one in listed if isinstance(one, str)) if isinstance(listed, (list, tuple)) else ()
