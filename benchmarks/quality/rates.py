# SPDX-License-Identifier: Apache-2.0
"""Which learning rates are tried, which one is taken, and how many steps take as long as another method's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any


EXTENSIONS = 2
"""How often a grid of learning rates is extended where the best is at its edge."""


def choose_rate(
    grid: tuple[float, ...], validation_loss: Callable[[float], float], *, grid_only: bool = False
) -> float:
    """
    The learning rate with the lowest loss on the validation text.

    Where the best is at an edge of the grid, the grid is extended beyond it by the step at that edge, at most
    [`EXTENSIONS`] times. Then the rates halfway between the best and its neighbors are tried: with steps of three a
    method is up to √3 away from its best rate, which can be more than what two methods differ by. A grid of one rate
    is a choice already.

    Args:
        grid (`tuple[float, ...]`): Rates to try.
        validation_loss (`Callable[[float], float]`): Measures a rate; infinite where training diverges.
        grid_only (`bool`): Whether no other rates are tried.
    """
    losses = {rate: validation_loss(rate) for rate in sorted(grid)}
    if grid_only:
        return min(losses, key=losses.__getitem__)
    for _ in range(EXTENSIONS):
        beyond = rate_beyond(losses)
        if beyond is None:
            break
        losses[beyond] = validation_loss(beyond)
    for between in rates_between(losses):
        losses[between] = validation_loss(between)
    return min(losses, key=losses.__getitem__)


def rate_beyond(losses: Mapping[float, float]) -> float | None:
    """The rate beyond the edge at which the best one is; `None` if it is inside, or alone."""
    rates = sorted(losses)
    best = min(losses, key=losses.__getitem__)
    if len(rates) == 1 or best not in (rates[0], rates[-1]):
        return None
    neighbor = rates[1] if best == rates[0] else rates[-2]
    return float(f"{best * best / neighbor:.2g}")


def rates_between(losses: Mapping[float, float]) -> list[float]:
    """The rates halfway, on a logarithmic scale, between the best one and those next to it."""
    rates = sorted(losses)
    best = rates.index(min(losses, key=losses.__getitem__))
    neighbors = rates[max(best - 1, 0) : best] + rates[best + 1 : best + 2]
    return [float(f"{math.sqrt(rates[best] * neighbor):.2g}") for neighbor in neighbors]


def equal_time_steps(steps: int, seconds: Mapping[str, Any], reference: str, name: str) -> int:
    """
    How many steps of a contender take as long as the steps of another.

    Args:
        steps (`int`): The steps of the other.
        seconds (`Mapping[str, Any]`): By name the `seconds` of each interleaved round.
        reference (`str`): The other.
        name (`str`): The contender.
    """
    pairs = zip(seconds[name]["seconds"], seconds[reference]["seconds"], strict=True)
    return max(1, round(steps / statistics.median(own / other for own, other in pairs)))


def is_worse(long: Mapping[str, Any], short: Mapping[str, Any]) -> bool:
    """Whether a run ended with a higher validation loss than a shorter one, or with none because it diverged."""
    losses = [float("inf") if run["validation_loss"] is None else run["validation_loss"] for run in (long, short)]
    return losses[0] > losses[1]
