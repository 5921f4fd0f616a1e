# SPDX-License-Identifier: Apache-2.0
"""Medians and spread of samples, and of their ratios round by round."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """The median of samples and their spread."""

    median: float
    lower_quartile: float
    upper_quartile: float
    minimum: float
    maximum: float
    count: int


def summarize(samples: Sequence[float]) -> Summary:
    """
    The median, quartiles and extremes of samples.

    Args:
        samples (`Sequence[float]`): At least one value.

    Returns:
        `Summary`: Quartiles interpolate between samples; of one sample all five values are that sample.

    Raises:
        ValueError: If there is no sample.
    """
    if not samples:
        raise ValueError("There are no samples to summarize: measure at least one round.")
    if len(samples) == 1:
        lower = upper = samples[0]
    else:
        lower, _, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return Summary(statistics.median(samples), lower, upper, min(samples), max(samples), len(samples))


def ratio_summary(samples: Mapping[str, Sequence[float]], name: str, reference: str) -> Summary:
    """
    The ratios to a reference, each within one round, summarized.

    Args:
        samples (`Mapping[str, Sequence[float]]`): Samples by name; the i-th samples of all names are of one round.
        name (`str`): The numerator.
        reference (`str`): The denominator.

    Returns:
        `Summary`: Of the ratios.
    """
    return summarize([value / base for value, base in zip(samples[name], samples[reference], strict=True)])
