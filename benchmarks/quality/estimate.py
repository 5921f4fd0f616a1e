# SPDX-License-Identifier: Apache-2.0
"""How much of a suite is left."""

from __future__ import annotations

import time
from collections.abc import Iterable

from .design import Study, TuningBudget


class Estimate:
    """
    The steps of tuning that a suite still takes, and the time, by what those of this run took with all around them.

    Args:
        studies (`Iterable[Study]`): The studies; what two of them have in common is made once.
        budget (`TuningBudget`): The steps of each run.
    """

    def __init__(self, studies: Iterable[Study], budget: TuningBudget) -> None:
        planned: dict[tuple[object, ...], float] = {}
        for study in studies:
            for one in () if study.steps_only else study.contenders:
                run = (study.model, study.pruning, one.method, str(one.options), one.equal)
                planned |= {(*run, seed): float(budget.steps) for seed in study.seeds}
                if study.rates_from is None and budget.rate_steps is not None:
                    planned[(*run, "rates")] = len(one.rates) * budget.rate_steps / budget.batch
        self._left, self._made = sum(planned.values()), 0.0
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
