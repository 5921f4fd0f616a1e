# SPDX-License-Identifier: Apache-2.0
"""How much of a suite is left, and what it takes on a GPU."""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch

from peft_spp.planning import TrainingPlan, plan_checkpoint, plan_training
from peft_spp.planning.estimate import Estimate as StepEstimate

from ..planning import LARGE, llama
from .design import Checkpoint, Study, Suite, TuningBudget
from .methods import METHODS
from .rates import EXTENSIONS
from .suites import SHAPES


A100_TFLOPS, UTILIZATION = 312.0, 0.4
"""What an A100 can do in bfloat16 by its data sheet, and the share of it that training is assumed to reach."""


class Estimate:
    """
    The steps of tuning that a suite still takes, and the time, by what those of this run took with all around them.

    Args:
        studies (`Iterable[Study]`): The studies; what two of them have in common is made once.
        budget (`TuningBudget`): The steps of each run.
    """

    def __init__(self, studies: Iterable[Study], budget: TuningBudget) -> None:
        self._left, self._made = planned_steps(studies, budget), 0.0
        self._seen: set[str] = set()
        self._start = time.monotonic()

    def count(self, key: str, steps: float, fresh: bool) -> None:
        """A run of so many steps is done: in this run of the suite, if it is `fresh`."""
        if key not in self._seen:
            self._seen.add(key)
            self._left -= steps
            self._made += steps * fresh

    def __str__(self) -> str:
        hours = (time.monotonic() - self._start) / 3600
        if not self._made:
            return f"{self._left:.0f} steps left"
        return f"{self._left:.0f} steps left, about {hours / self._made * self._left:.1f} hours at this pace"


def planned_steps(studies: Iterable[Study], budget: TuningBudget, more_rates: int = 0) -> float:
    """
    The steps of all runs of some studies.

    Args:
        studies (`Iterable[Study]`): The studies; what two of them have in common is made once.
        budget (`TuningBudget`): The steps of each run.
        more_rates (`int`, *optional*, defaults to 0): By how many rates each grid is extended.
    """
    planned: dict[tuple[object, ...], float] = {}
    for study in studies:
        for one in () if study.steps_only else study.contenders:
            run = (study.model, study.pruning, one.method, str(one.options), one.equal)
            planned |= {(*run, seed): float(budget.steps) for seed in study.seeds}
            if study.rates_from is not None:
                continue
            rates = len(one.rates or METHODS[one.method].rates)
            if budget.rate_steps is not None:
                planned[(*run, "rates")] = rates * budget.rate_steps / budget.batch
            else:  # of the whole runs that choose a rate, one is the run with the first seed
                planned[(*run, "rates")] = (rates - 1 + more_rates) * budget.steps
    return sum(planned.values())


def needs_on_gpu(suite: Suite) -> list[str]:
    """
    What the checkpoints of a suite take on one GPU, by arithmetic: memory, and the time of their tuning runs.

    Args:
        suite (`Suite`): The suite. Models that it trains itself are left out.

    Returns:
        `list[str]`: A line for each checkpoint.
    """
    budget, lines = suite.budget, []
    for one in suite.models:
        if not isinstance(one, Checkpoint) or not one.source:
            continue
        together = budget.micro_batch or budget.batch
        plan = _plan(one.source, one.dtype, together, one.sequence)
        step = StepEstimate(plan, None, A100_TFLOPS, UTILIZATION).seconds * budget.batch / together
        studies = [study for study in suite.studies if study.model == one.name]
        # a grid is extended at its edge, and by the rates on both sides of the best
        steps = [planned_steps(studies, budget, more_rates) for more_rates in (0, EXTENSIONS + 2)]
        hours = [f"{number * step / 3600:.2g}" for number in steps]
        lines.append(
            f"{one.name} with SPP: {plan.total / 1e9:.1f} GB of GPU memory (base model {plan.weights / 1e9:.1f} GB), "
            f"{step:.2g} s a step of {budget.batch} × {one.sequence} tokens on an A100 "
            f"({UTILIZATION:.0%} of {A100_TFLOPS:g} TFLOP/s), {' to '.join(dict.fromkeys(hours))} hours for all "
            "tuning; evaluation is extra. Computed, not measured."
        )
    return lines


@cache
def _plan(source: str, dtype: str, batch: int, sequence: int) -> TrainingPlan:
    settings: dict[str, Any] = {"batch": batch, "sequence": sequence, "gradient_checkpointing": True}
    if source in SHAPES:
        return plan_training(llama(LARGE[SHAPES[source]], getattr(torch, dtype), "meta"), **settings)
    return plan_checkpoint(source, dtype=getattr(torch, dtype), **settings)
