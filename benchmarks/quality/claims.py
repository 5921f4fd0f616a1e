# SPDX-License-Identifier: Apache-2.0
"""What is claimed of SPP, and whether the measurements bear it out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .analysis import Analysis, Outcome
from .suites import AT_2_4, AT_75, Pruning


SHARE = 0.5
"""SPP shall win back at least this share of what full fine-tuning with masked gradients wins back."""
CLAIMED = (AT_2_4, AT_75)
VARIANTS = {"spp": "SPP", "spp_positive": "SPP with a positive start"}
"""Of which methods this is claimed, and what they are called."""


@dataclass(frozen=True)
class Claim:
    """A claim.

    Args:
        text (`str`): What is claimed.
        holds (`bool`): Whether it was measured so.
        evidence (`str`): The figures.
    """

    text: str
    holds: bool
    evidence: str


def claims_of(analysis: Analysis, model: str) -> list[Claim]:
    """The claims for each of the prunings and of SPP's starts that they are made for and that were measured."""
    return [claim for pruning in CLAIMED for method in VARIANTS for claim in _claims(analysis, model, pruning, method)]


def _claims(analysis: Analysis, model: str, pruning: Pruning, method: str) -> list[Claim]:
    name, spp = VARIANTS[method], analysis.find(model, pruning, method)
    full = analysis.find(model, pruning, "masked_full")
    if spp is None or full is None:
        return []
    share = shares_of_full(spp, full)
    claims = [
        Claim(
            f"{pruning.label}: {name} wins back at least half of the log-perplexity that full fine-tuning with masked "
            "gradients wins back",
            min(share) >= SHARE,
            f"{_percents(share)} of it, and {_percents(_values(spp))} of what pruning had cost",
        )
    ]
    for rival, deployment in (("lora", "remasked"), ("ia3", "merged")):
        other = analysis.find(model, pruning, rival, deployment)
        if other is not None:
            claims.append(_beats(name, spp, other))
    better = [loss < spp.pruned_loss for loss in spp.losses]
    claims.append(
        Claim(
            f"{pruning.label}: {name} beats no fine-tuning",
            all(better),
            f"perplexity {spp.perplexity.mean:.2f} against {math.exp(spp.pruned_loss):.2f}",
        )
    )
    lost = [count for count in spp.deployed("zeros_lost")]
    patterns = [kept for kept in spp.deployed("pattern_kept") if kept is not None]
    claims.append(
        Claim(
            f"{pruning.label}: {name} keeps every pruned place in the merged model",
            all(count == 0 for count in lost) and all(patterns),
            f"{sum(count or 0 for count in lost)} zeros lost in {len(lost)} models"
            + (f", every group is {pruning.pattern}" if patterns and all(patterns) else ""),
        )
    )
    return claims


def shares_of_full(outcome: Outcome, full: Outcome) -> list[float]:
    """Seed by seed, what was won back over what masked full fine-tuning won back."""
    return [
        (outcome.pruned_loss - own) / (outcome.pruned_loss - best)
        for own, best in zip(outcome.losses, full.losses, strict=False)
    ]


def _beats(name: str, spp: Outcome, other: Outcome) -> Claim:
    wins = [own < theirs for own, theirs in zip(spp.losses, other.losses, strict=False)]
    return Claim(
        f"{spp.pruning.label}: {name} beats {other.label}",
        all(wins),
        f"perplexity {spp.perplexity.mean:.2f} against {other.perplexity.mean:.2f}, better with {sum(wins)} of "
        f"{len(wins)} seeds",
    )


def _values(outcome: Outcome) -> list[float]:
    return [(outcome.pruned_loss - own) / (outcome.pruned_loss - outcome.dense_loss) for own in outcome.losses]


def _percents(values: Sequence[float]) -> str:
    return " / ".join(f"{value:.0%}" for value in values)
