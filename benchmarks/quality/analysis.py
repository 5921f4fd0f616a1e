# SPDX-License-Identifier: Apache-2.0
"""What the measurements say: chosen learning rates, losses over seeds, and how much was won back."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .design import Pruning
from .methods import METHODS, RANKS, SHARE
from .plan import contender_name
from .store import Record, Store


TEXTS = {"data": "", "samples": " on samples", "both": " on mixed text", "questions": " on the tasks' training parts"}
NAMED = {"r", "share", "teacher", "text"}
"""The options that a label has words for."""
DEPLOYMENTS = {"merged": "merged", "unmerged": "not merged", "remasked": "merged, masked again"}


@dataclass(frozen=True)
class Spread:
    """A mean over seeds, and the sample standard deviation, 0 of a single one."""

    mean: float
    deviation: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of values."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))


@dataclass(frozen=True)
class Outcome:
    """A contender in one deployment, on one pruned model, at its learning rate.

    Args:
        model (`str`): The model.
        pruning (`Pruning`): How it is pruned.
        method (`str`): The method.
        options (`Mapping[str, Any]`): What differs from its defaults.
        equal (`str`, *optional*): What was made equal to SPP: `"parameters"` or `"time"`.
        deployment (`str`): What became of the trained model.
        rate (`float`): The learning rate with the lowest validation loss.
        rates (`tuple[float, ...]`): All that were tried, ascending.
        runs (`tuple[Record, ...]`): The runs at that rate, by seed.
        dense_loss (`float`): The test loss of the dense model.
        pruned_loss (`float`): The test loss of the pruned model.
    """

    model: str
    pruning: Pruning
    method: str
    options: Mapping[str, Any]
    equal: str | None
    deployment: str
    rate: float
    rates: tuple[float, ...]
    runs: tuple[Record, ...]
    dense_loss: float
    pruned_loss: float

    @property
    def name(self) -> str:
        """The contender's name, as in the measurements of the steps."""
        return contender_name(self.method, self.options)

    @property
    def label(self) -> str:
        """For readers."""
        return label_of(self.runs[0].settings, self.deployment)

    @property
    def losses(self) -> list[float]:
        """The test losses by seed."""
        return [run.measured["deployments"][self.deployment]["test_loss"] for run in self.runs]

    @property
    def perplexity(self) -> Spread:
        """The perplexity on the test text."""
        return Spread.of([math.exp(loss) for loss in self.losses])

    @property
    def recovery(self) -> Spread:
        """The share of the log-perplexity lost by pruning that was won back, toward the dense model."""
        lost = self.pruned_loss - self.dense_loss
        return Spread.of([(self.pruned_loss - own) / lost for own in self.losses])

    @property
    def at_edge(self) -> bool:
        """Whether the rate is at the edge of those that were tried."""
        return len(self.rates) > 1 and self.rate in (self.rates[0], self.rates[-1])

    def measured(self, name: str) -> Any:
        """A measure of the first run."""
        return self.runs[0].measured.get(name)

    def deployed(self, name: str) -> list[Any]:
        """A measure of the deployed model, by seed."""
        return [run.measured["deployments"][self.deployment].get(name) for run in self.runs]


def label_of(settings: Mapping[str, Any], deployment: str | None = "merged") -> str:
    """A contender for readers, by the settings of a run or of a suite: in one deployment, or in general if `None`."""
    method, options, equal = settings["method"], settings["options"], settings["equal"]
    label = METHODS[method].style.label
    if equal == "parameters" and (method == "supertuning" or "r" not in options):
        label += ", SPP's number of parameters"
    elif method in RANKS:
        label += f", r={options.get('r', RANKS[method])}"
    elif method == "supertuning":
        label += f", {SHARE:.0%} of the weights"
    others = [f"{name} {value}" for name, value in options.items() if name not in NAMED]
    return with_remarks(label, [*others, *remarks_of(settings, deployment)])


def remarks_of(settings: Mapping[str, Any], deployment: str | None) -> list[str]:
    """What a contender was tuned on, its deployment, and its time, for readers."""
    options, remarks = settings["options"], []
    if "text" in options:
        remarks.append(f"{'distilled' if options.get('teacher') else 'tuned'}{TEXTS[options['text']]}")
    if settings["method"] == "lora" and deployment is not None:
        remarks.append(DEPLOYMENTS[deployment])
    if settings["equal"] == "time":
        remarks.append(f"SPP's time, {settings['steps']} steps" if "steps" in settings else "SPP's time")
    return remarks


def with_remarks(label: str, remarks: Sequence[str]) -> str:
    """A label, with remarks in brackets."""
    return f"{label} ({'; '.join(remarks)})" if remarks else label


@dataclass(frozen=True)
class Analysis:
    """The outcomes of a suite.

    Args:
        store (`Store`): The measurements.
        outcomes (`tuple[Outcome, ...]`): In the order they were measured.
        losses (`Mapping[tuple[str, str | None], float]`): The test loss by model and pruning, before fine-tuning.
    """

    store: Store
    outcomes: tuple[Outcome, ...]
    losses: Mapping[tuple[str, str | None], float]

    def of(self, model: str, pruning: Pruning) -> list[Outcome]:
        """The outcomes on one pruned model."""
        return [one for one in self.outcomes if (one.model, one.pruning) == (model, pruning)]

    def find(self, model: str, pruning: Pruning, method: str, deployment: str = "merged") -> Outcome | None:
        """The outcome of a method with its defaults."""
        for one in self.of(model, pruning):
            if (one.method, one.deployment) == (method, deployment) and not one.options and one.equal is None:
                return one
        return None

    @property
    def studied(self) -> list[tuple[str, Pruning]]:
        """The pruned models, in the order they were measured."""
        return list(dict.fromkeys((one.model, one.pruning) for one in self.outcomes))

    def steps(self, model: str, name: str) -> Mapping[str, Any]:
        """The costs of the training steps that were measured side by side with a contender's; empty if none were."""
        for one in self.store.records:
            if one.kind == "profile" and one.settings["model"] == model and name in one.measured:
                return one.measured
        return {}

    def step_ratio(self, model: str, name: str, reference: str = contender_name("spp", {})) -> float | None:
        """The median over rounds of a step's time over that of SPP."""
        steps = self.steps(model, name)
        if reference not in steps:
            return None
        pairs = zip(steps[name]["seconds"], steps[reference]["seconds"], strict=True)
        return statistics.median(own / other for own, other in pairs)


def analyze(store: Store) -> Analysis:
    """Gather the measurements of a suite, of the models that it had at its last run."""
    newest = {one.settings["model"]: one.settings["base"] for one in store.records}
    records = [one for one in store.records if one.settings["base"] == newest[one.settings["model"]]]
    losses = {
        (one.settings["model"], one.settings["pruning"]): one.measured["test_loss"]
        for one in records
        if one.kind == "base"
    }
    groups: dict[str, list[Record]] = {}
    for record in records:
        if record.kind == "tune":
            shared = {name: value for name, value in record.settings.items() if name not in ("rate", "seed")}
            groups.setdefault(repr(sorted(shared.items(), key=lambda item: item[0])), []).append(record)
    outcomes: list[Outcome] = []
    for group in groups.values():
        outcomes += _outcomes(group, losses)
    return Analysis(store, tuple(outcomes), losses)


def _outcomes(group: list[Record], losses: Mapping[tuple[str, str | None], float]) -> list[Outcome]:
    """Those of one contender on one pruned model: one for each deployment, none where every run diverged."""
    settings = group[0].settings
    first_seed = settings["seed"]
    validation = {
        one.settings["rate"]: one.measured["validation_loss"]
        for one in group
        if one.settings["seed"] == first_seed and one.measured["validation_loss"] is not None
    }
    if not validation:
        return []
    rate = min(validation, key=validation.__getitem__)
    at_rate = sorted((one for one in group if one.settings["rate"] == rate), key=lambda one: one.settings["seed"])
    tried = tuple(sorted({one.settings["rate"] for one in group}))
    outcomes = [
        Outcome(
            settings["model"],
            Pruning.of(settings["pruning"]),
            settings["method"],
            settings["options"],
            settings["equal"],
            deployment,
            rate,
            tried,
            tuple(run for run in at_rate if _is_finite(run, deployment)),
            losses[settings["model"], None],
            losses[settings["model"], settings["pruning"]],
        )
        for deployment in METHODS[settings["method"]].deployments
    ]
    return [outcome for outcome in outcomes if outcome.runs]


def _is_finite(run: Record, deployment: str) -> bool:
    measured = run.measured["deployments"].get(deployment)
    return measured is not None and measured["test_loss"] is not None
