# SPDX-License-Identifier: Apache-2.0
"""From a matrix of importance scores to a pruning mask."""

from typing import Literal

import torch

from ..sparsity import NMPattern


def check_pruning_request(pattern: str | NMPattern | None, sparsity: float | None) -> None:
    """Raise a `ValueError` unless exactly one of `pattern` and `sparsity` is given, and is valid."""
    if (pattern is None) == (sparsity is None):
        raise ValueError(f"Give exactly one of pattern and sparsity, got {pattern=} and {sparsity=}.")
    if pattern is not None:
        NMPattern.parse(pattern)
    # The negated form also rejects NaN.
    if sparsity is not None and not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity should be in [0, 1) but the value passed is {sparsity}.")


def num_to_prune(sparsity: float, size: int) -> int:
    """How many of `size` weights a sparsity below 1 prunes: the nearest number, but never all."""
    return min(round(sparsity * size), size - 1)


def pruning_mask(
    scores: torch.Tensor,
    *,
    pattern: str | NMPattern | None = None,
    sparsity: float | None = None,
    comparison_group: Literal["row", "layer"] = "row",
) -> torch.Tensor:
    """
    Compute which weights of one linear layer are kept.

    In each comparison group the weights with the lowest scores are pruned. Of equal scores the one that comes first
    (in row-major order) is pruned first, so that exactly the requested number is pruned, always the same ones.

    Args:
        scores (`torch.Tensor`): Importance of each weight, of shape `(out_features, in_features)`.
        pattern (`str` or `NMPattern`, *optional*):
            N:M pattern: the comparison groups are M consecutive weights along the input, of which N are kept.
        sparsity (`float`, *optional*):
            Fraction of the weights of each comparison group to prune, in [0, 1). The number to prune is rounded to
            the nearest integer, but at least one weight of a group is kept: `sparsity=0.99` keeps one of 32.
        comparison_group (`str`, *optional*, defaults to `"row"`):
            With `sparsity`, whether weights are compared within their row (`"row"`) or the whole layer (`"layer"`).

    Returns:
        `torch.Tensor`: Boolean mask of the shape of `scores`: `True` where the weight is kept.
    """
    check_pruning_request(pattern, sparsity)
    if pattern is not None:
        n_m = NMPattern.parse(pattern)
        if scores.shape[-1] % n_m.m != 0:
            raise ValueError(f"{scores.shape[-1]} input features are not divisible by the M of pattern {pattern}.")
        groups = scores.reshape(-1, n_m.m)
        num_pruned = n_m.m - n_m.n
    else:
        assert sparsity is not None  # checked above; tells type checkers
        groups = scores if comparison_group == "row" else scores.reshape(1, -1)
        num_pruned = num_to_prune(sparsity, groups.shape[-1])

    # A stable sort breaks ties by position; a threshold or an unstable top-k would not.
    pruned = groups.argsort(dim=-1, stable=True)[:, :num_pruned]
    return torch.ones_like(groups, dtype=torch.bool).scatter_(-1, pruned, False).reshape(scores.shape)
