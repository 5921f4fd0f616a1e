# SPDX-License-Identifier: Apache-2.0
"""Which measurements a suite needs, in which order; those that the store has are not made again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from rich.progress import Progress

from peft_spp.demo.display import add_bar

from .base_models import BaseModel
from .design import Checkpoint, Contender, Study, Suite
from .estimate import Estimate
from .jobs import measure_base, measure_rate, measure_steps, measure_tuned
from .methods import METHODS, equal_options
from .rates import choose_rate, equal_time_steps, is_worse
from .store import UNSTABLE, Record, Store, key_of


def contender_name(method: str, options: Mapping[str, Any]) -> str:
    """A short name that tells contenders apart, such as `hira r=8`."""
    return " ".join([method, *(f"{name}={options[name]}" for name in sorted(options))])


@dataclass
class Session:
    """
    A run of a suite.

    Args:
        suite (`Suite`): What to measure.
        bases (`Mapping[str, BaseModel]`): Its models by name.
        store (`Store`): What is measured already, and where the rest goes.
        progress (`Progress`): The display.
        whole (`bool`): Whether nothing of the suite is left out.
    """

    suite: Suite
    bases: Mapping[str, BaseModel]
    store: Store
    progress: Progress
    whole: bool = True

    def run(self) -> None:
        """Measure what is missing."""
        self._total = self.progress.add_task(f"Suite {self.suite.name}", total=planned_runs(self.suite), note="")
        self._left = Estimate(self.suite.studies, self.suite.budget)
        for study in self.suite.studies:
            self._prepare(self.bases[study.model])
            self._run_study(study)
        if self.whole:
            self.store.finish(write=self._is_main)

    def _prepare(self, base: BaseModel) -> None:
        """Train the model, if it has not been, and measure it dense."""
        if not base.is_made:
            with _Bar(self.progress, f"Train {base.spec.name} from scratch", base.training_steps) as bar:
                base.make(bar)
        settings = {"base": base.fingerprint, "model": base.spec.name, "pruning": None}
        self._measure("base", settings, partial(_measure_dense, base))

    def _run_study(self, study: Study) -> None:
        base = self.bases[study.model]
        self._measure_pruned(study)
        profile = self._profile(study) if study.rates_from is None else None
        if study.steps_only:
            return
        chosen: dict[str, float] = {}
        for contender in sorted(study.contenders, key=lambda one: one.equal is not None):
            options = self._options(contender, base)
            name = contender_name(contender.method, options)
            steps = self.suite.budget.steps
            if contender.equal == "time":
                costs = profile or self._known_profile(study, {"spp", name})
                steps = equal_time_steps(steps, costs, "spp", name)
                plain = replace(contender, equal=None)
                rate = chosen[name] if name in chosen else self._stable_rate(study, plain, options)
            else:
                rate = self._stable_rate(study, contender, options)
            chosen[name] = rate
            for seed in study.seeds:
                self._tune(study, contender, options, rate, seed, steps)
                self.progress.advance(self._total)

    def _measure_pruned(self, study: Study, own_copy: bool = False) -> None:
        """Measure the pruned model, unless a copy of it has been, or this machine's if that is wanted."""
        base = self.bases[study.model]
        settings: dict[str, Any] = {"base": base.fingerprint, "model": study.model, "pruning": study.pruning.name}
        settings |= self._copy(study) if own_copy else {}
        self._measure("base", settings, lambda: measure_base(base, study.pruning), copy=partial(self._copy, study))

    def _measure_reference(self, study: Study, reference: Contender) -> None:
        """Measure this machine's copy of the pruned model, and on it what the others are compared with."""
        self._measure_pruned(study, own_copy=True)
        options = self._options(reference, self.bases[study.model])
        rate, _ = self._best_rate(study, reference, options)
        self._tune(study, reference, options, rate, study.seeds[0], self.suite.budget.steps, own_copy=True)

    def _copy(self, study: Study) -> dict[str, str | None]:
        """What tells this machine's copy of the pruned model from others, where these are told apart."""
        return {"weights": self.bases[study.model].weights_id(study.pruning)} if self.suite.reference else {}

    def _stable_rate(self, study: Study, contender: Contender, options: Mapping[str, Any]) -> float:
        """
        The learning rate that a contender is tuned at.

        Short runs favor rates that are too high for long ones. Where the long run with the first seed ends worse than
        the short one did, it is kept as `unstable`, and the best of the lower rates is taken, if there is one.
        """
        seed, (kind, steps) = study.seeds[0], self._rate_runs
        origin = study if study.rates_from is None else replace(study, pruning=study.rates_from)
        while True:
            rate, lower = self._best_rate(study, contender, options)
            long = self._tune(study, contender, options, rate, seed, self.suite.budget.steps)
            short = self.store.find(kind, self._settings(origin, contender, options, rate, seed, steps, kind))
            if kind == "tune" or short is None or not lower or not is_worse(long, short):
                return rate
            settings = self._settings(study, contender, options, rate, seed, self.suite.budget.steps)
            self.store.relabel("tune", settings, UNSTABLE, write=self._is_main)

    def _best_rate(
        self, study: Study, contender: Contender, options: Mapping[str, Any]
    ) -> tuple[float, Sequence[float]]:
        """The best rate of the short runs below what long runs found unstable, and the rates below it."""
        prunings = {one.name for one in (study.pruning, study.rates_from) if one}
        records = self._records_of(study, contender.method, options)
        unstable = [
            one.settings["rate"] for one in records if one.kind == UNSTABLE and one.settings["pruning"] in prunings
        ]
        bound = min(unstable, default=math.inf)
        if study.rates_from is not None:
            losses = self._losses_of(study, contender, options)
            left = [rate for rate in losses if rate < bound]
            if not left:
                raise ValueError(
                    f"{contender_name(contender.method, options)} on {study.pruning.label} takes its learning rate "
                    f"from the runs on {study.rates_from.label}, which are not measured: run those before"
                )
            best = min(left, key=losses.__getitem__)
        else:
            left = [rate for rate in contender.rates or METHODS[contender.method].rates if rate < bound]
            validation_loss = partial(self._validation_loss, study, contender, options)
            best = choose_rate(tuple(left), validation_loss, grid_only=self._rate_runs[0] == "rate")
        return best, [rate for rate in left if rate < best]

    def _validation_loss(self, study: Study, contender: Contender, options: Mapping[str, Any], rate: float) -> float:
        kind, steps = self._rate_runs
        measured = self._tune(study, contender, options, rate, study.seeds[0], steps, kind)
        loss = measured["validation_loss"]
        return float("inf") if loss is None else float(loss)

    def _losses_of(self, study: Study, contender: Contender, options: Mapping[str, Any]) -> dict[float, float]:
        """The validation loss by rate, of the runs that chose the rate for another pruning of the same model."""
        assert study.rates_from is not None
        kind, steps = self._rate_runs
        wanted = {"pruning": study.rates_from.name, "seed": 0, "steps": steps, "equal": contender.equal}
        return {
            one.settings["rate"]: one.measured["validation_loss"]
            for one in self._records_of(study, contender.method, options)
            if one.kind == kind
            and all(one.settings[name] == value for name, value in wanted.items())
            and one.measured["validation_loss"] is not None
        }

    def _records_of(self, study: Study, method: str, options: Mapping[str, Any]) -> list[Record]:
        """All that is measured of a method on the model, however that is pruned."""
        wanted = {"base": self.bases[study.model].fingerprint, "method": method, "options": dict(options)}
        return [
            one for one in self.store.records if all(one.settings.get(name) == value for name, value in wanted.items())
        ]

    def _tune(
        self,
        study: Study,
        contender: Contender,
        options: Mapping[str, Any],
        rate: float,
        seed: int,
        steps: int,
        kind: str = "tune",
        own_copy: bool = False,
    ) -> dict[str, Any]:
        base = self.bases[study.model]
        settings = self._settings(study, contender, options, rate, seed, steps, kind)
        settings |= self._copy(study) if own_copy else {}
        name = contender_name(contender.method, options)
        label = f"{study.model}, {study.pruning.label}: {name}, rate {rate:g}, seed {seed}"
        reference = self.suite.reference if kind == "tune" and not own_copy else None
        if reference and self.store.find(kind, settings) is None:
            self._measure_reference(study, reference)

        def measure() -> dict[str, Any]:
            with _Bar(self.progress, label, steps) as bar:
                measure_run = measure_tuned if kind == "tune" else measure_rate
                return measure_run(
                    base,
                    study.pruning,
                    METHODS[contender.method],
                    options,
                    rate=rate,
                    seed=seed,
                    steps=steps,
                    on_step=bar,
                )

        whole = steps if kind == "tune" else steps / self.suite.budget.batch
        copy = partial(self._copy, study) if kind == "tune" else dict
        return self._measure(kind, settings, measure, whole, label, copy)

    def _settings(
        self,
        study: Study,
        contender: Contender,
        options: Mapping[str, Any],
        rate: float,
        seed: int,
        steps: int,
        kind: str = "tune",
    ) -> dict[str, Any]:
        """What tells a run from all others."""
        return {
            "base": self.bases[study.model].fingerprint,
            "model": study.model,
            "pruning": study.pruning.name,
            "method": contender.method,
            "options": dict(options),
            "equal": contender.equal,
            "rate": rate,
            "seed": seed,
            "steps": steps,
            "batch": self.suite.budget.batch if kind == "tune" else 1,
        }

    def _profile(self, study: Study) -> dict[str, Any] | None:
        """The costs of the steps of several methods, once for a model: they do not depend on where the zeros are."""
        base = self.bases[study.model]
        # those of a checkpoint are measured in a separate study, which is run on an idle machine
        apart = isinstance(base.spec, Checkpoint) and not study.steps_only
        if apart or {one.method for one in study.contenders} == {"spp"}:
            return None
        # SPP is always among them: times are told as ratios to its
        contenders: dict[str, tuple[str, Mapping[str, Any]]] = {contender_name("spp", {}): ("spp", {})}
        for contender in study.contenders:
            options = self._options(contender, base)
            # a step does not depend on the text, and a teacher adds a forward pass to any method's
            if not {"teacher", "text"} & set(options):
                contenders[contender_name(contender.method, options)] = (contender.method, options)
        settings = {"base": base.fingerprint, "model": study.model, "contenders": sorted(contenders)}
        return self._measure("profile", settings, lambda: measure_steps(base, study.pruning, contenders))

    def _known_profile(self, study: Study, names: set[str]) -> dict[str, Any]:
        """The newest costs of the steps that have these contenders."""
        fingerprint = self.bases[study.model].fingerprint
        for one in reversed(self.store.records):
            if one.kind == "profile" and one.settings["base"] == fingerprint and names <= one.measured.keys():
                return one.measured
        raise ValueError(f"the costs of the steps of {', '.join(sorted(names))} are missing: run --steps-only before")

    def _options(self, contender: Contender, base: BaseModel) -> dict[str, Any]:
        if contender.equal != "parameters":
            return dict(contender.options)
        return {**contender.options, **equal_options(base.load(None), contender.method)}

    def _measure(
        self,
        kind: str,
        settings: Mapping[str, Any],
        measure: Callable[[], dict[str, Any]],
        steps: float = 0.0,
        label: str = "",
        copy: Callable[[], Mapping[str, Any]] = dict,
    ) -> dict[str, Any]:
        """
        What the store has, or what is measured now and then stored, by the first process alone. What `copy` returns is
        added to the settings once it is measured.
        """
        known = self.store.find(kind, settings)
        if known is not None:
            self._left.count(key_of(kind, settings), steps, fresh=False)
            return known
        measured = measure()
        self.store.add(kind, {**settings, **copy()}, measured, write=self._is_main)
        self._left.count(key_of(kind, settings), steps, fresh=True)
        if label:
            self.progress.console.print(f"{label}: {self._left}", markup=False)
        return measured

    @property
    def _rate_runs(self) -> tuple[str, int]:
        """The kind and the steps of the runs that choose learning rates."""
        budget = self.suite.budget
        return ("tune", budget.steps) if budget.rate_steps is None else ("rate", budget.rate_steps)

    @property
    def _is_main(self) -> bool:
        return next(iter(self.bases.values())).accelerator.is_main_process


def _measure_dense(base: BaseModel) -> dict[str, Any]:
    return measure_base(base, None) | {"training": base.training()}


def planned_runs(suite: Suite) -> int:
    """How many runs of fine-tuning are reported; choosing learning rates takes more."""
    return sum(len(study.contenders) * len(study.seeds) for study in suite.studies if not study.steps_only)


def describe(suite: Suite) -> list[str]:
    """A line for each study: what it compares."""
    lines = []
    for study in suite.studies:
        names = [
            contender_name(one.method, one.options) + (f" (equal {one.equal})" if one.equal else "")
            for one in study.contenders
        ]
        rates = f", rates of {study.rates_from.label}" if study.rates_from else ", rates from a grid"
        lines.append(f"{study.model}, {study.pruning.label}{rates}, {len(study.seeds)} seeds: {', '.join(names)}")
    return lines


class _Bar:
    """The bar of one run, removed at its end; calling it moves it."""

    def __init__(self, progress: Progress, description: str, steps: int) -> None:
        self.progress, self.description, self.steps = progress, description, steps

    def __enter__(self) -> _Bar:
        self.task = add_bar(self.progress, self.description, self.steps)
        return self

    def __call__(self, step: int, loss: float) -> None:
        self.progress.update(self.task, completed=step, note=f"loss {loss:.3f}")

    def __exit__(self, *error: object) -> None:
        self.progress.remove_task(self.task)
