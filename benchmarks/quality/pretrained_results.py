# SPDX-License-Identifier: Apache-2.0
"""What the suite of a pretrained model found: entries with perplexities, accuracies, and their spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .analysis import Spread, label_of
from .design import Pruning
from .methods import METHODS
from .plan import contender_name
from .store import Record, Store


METRIC = "acc_norm"


@dataclass(frozen=True)
class Entry:
    """A model as it is deployed: dense, pruned, or tuned by a contender.

    Args:
        label (`str`): For readers.
        deployed (`tuple[Mapping[str, Any], ...]`): What was measured of it, by seed.
        settings (`Mapping[str, Any]`): Of its run; empty if it was not tuned.
        tuned (`Mapping[str, Any]`): What was measured of its training with the first seed.
        deployment (`str`): What became of the trained model.
        rates (`Mapping[float, float | None]`): The rates that were tried, with the loss on the validation text.
        machine (`str`): What it was measured on.
        gave_way (`bool`): Whether it was tuned at another rate than the one that was chosen later.
    """

    label: str
    deployed: tuple[Mapping[str, Any], ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    tuned: Mapping[str, Any] = field(default_factory=dict)
    deployment: str = "merged"
    rates: Mapping[float, float | None] = field(default_factory=dict)
    machine: str = ""
    gave_way: bool = False

    @property
    def name(self) -> str:
        """The contender, as in the measurements of the steps."""
        return contender_name(self.settings["method"], self.settings["options"]) if self.settings else ""

    @property
    def saw_tasks(self) -> bool:
        """Whether it was tuned on the training parts of the tasks."""
        return bool(self.settings) and self.settings["options"].get("text") == "questions"

    @property
    def zeros_lost(self) -> int:
        """The most zeros that a seed lost."""
        return max(one["zeros_lost"] or 0 for one in self.deployed)

    def losses(self, text: str) -> list[float]:
        """The loss on a text, by seed."""
        return [one["losses"][text] for one in self.deployed]

    def perplexity(self, text: str) -> Spread:
        """The perplexity on a text, over the seeds."""
        return Spread.of([math.exp(loss) for loss in self.losses(text)])

    @property
    def accuracy(self) -> float:
        """The mean over tasks of the share of right answers, over the seeds."""
        return statistics.fmean(statistics.fmean(right) for right in self._right())

    @property
    def accuracy_error(self) -> float:
        """Its standard error, by the questions."""
        return _error(self._right())

    def gain(self, other: Entry) -> tuple[float, float]:
        """How much more accurate it is than another, and the standard error, by the same questions."""
        return _paired(self._right(), other._right())

    def probability_gain(self, other: Entry) -> tuple[float, float]:
        """The same of the probability of the right choice, which tells models apart that are right as often."""
        return _paired(self._probabilities(), other._probabilities())

    @property
    def has_tasks(self) -> bool:
        """Whether it was asked questions."""
        return all(one.get("tasks") for one in self.deployed)

    def _right(self) -> list[list[float]]:
        """By task and question the share of seeds that are right."""
        tasks = self.deployed[0]["tasks"]
        strings = {task: [one["tasks"][task][f"{METRIC} right"] for one in self.deployed] for task in tasks}
        return [
            [statistics.fmean(map(int, digits)) for digits in zip(*some, strict=True)] for some in strings.values()
        ]

    def _probabilities(self) -> list[list[float]]:
        """By task and question the probability of the right choice, in the mean over seeds."""
        tasks = self.deployed[0]["tasks"]
        columns = {task: [one["tasks"][task]["probability"] for one in self.deployed] for task in tasks}
        return [[statistics.fmean(values) for values in zip(*some, strict=True)] for some in columns.values()]


def _paired(own: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The mean over tasks of the differences between the same questions, and its standard error."""
    differences = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(own, other, strict=True)]
    return statistics.fmean(statistics.fmean(some) for some in differences), _error(differences)


def _error(tasks: Sequence[Sequence[float]]) -> float:
    """The standard error of the mean over tasks of the means over questions."""
    return math.sqrt(sum(statistics.variance(values) / len(values) for values in tasks)) / len(tasks)


@dataclass(frozen=True)
class Comparison:
    """What was measured on one pruned model.

    Args:
        pruning (`Pruning`): How it is pruned.
        dense (`Entry`): The model before.
        pruned (`Entry`): It, not tuned.
        entries (`tuple[Entry, ...]`): It, tuned: SPP, then what keeps the zeros, then the others.
        copy (`int`): Which copy of the pruned model, as each machine prunes its own: 0 for the one with the most
            entries.
    """

    pruning: Pruning
    dense: Entry
    pruned: Entry
    entries: tuple[Entry, ...]
    copy: int = 0

    @property
    def mark(self) -> str:
        """What tells its entries from those of the first copy, for readers."""
        return f" {'†' * self.copy}" if self.copy else ""

    @property
    def label(self) -> str:
        """How it is pruned, and which copy it is, for readers."""
        return self.pruning.label + self.mark

    def find(self, method: str, deployment: str = "merged", **options: Any) -> Entry | None:
        """The entry of a method with these options."""
        for one in self.entries:
            wanted = (method, deployment, options)
            if (one.settings["method"], one.deployment, dict(one.settings["options"])) == wanted:
                return one
        return None

    def won_back(self, entry: Entry, text: str) -> float:
        """The share of the log-perplexity lost by pruning that was won back; NaN if pruning cost none."""
        lost = self.pruned.losses(text)[0] - self.dense.losses(text)[0]
        own = self.pruned.losses(text)[0] - statistics.fmean(entry.losses(text))
        return own / lost if lost > 0 else math.nan

    def tasks_won_back(self, entry: Entry) -> float:
        """The share of the accuracy lost by pruning that was won back; NaN if pruning cost none."""
        lost = self.dense.gain(self.pruned)[0]
        return entry.gain(self.pruned)[0] / lost if lost > 0 else math.nan

    def tasks_won_back_error(self, entry: Entry) -> float:
        """The standard error of that share, with what pruning cost taken as exact; NaN if it cost none."""
        lost = self.dense.gain(self.pruned)[0]
        return entry.gain(self.pruned)[1] / lost if lost > 0 else math.nan


def comparisons_of(store: Store) -> list[Comparison]:
    """
    The comparisons of a suite's last model, as far as they are measured: in the order of the prunings, and of each the
    copies with more entries first.
    """
    newest = store.records[-1].settings["base"]
    records = [one for one in store.records if one.settings["base"] == newest]
    bases = [one for one in records if one.kind == "base"]
    before = next(one for one in bases if one.settings["pruning"] is None)
    dense = Entry("dense", (before.measured,), machine=machine_of(store, before))
    comparisons = []
    for name in dict.fromkeys(one.settings["pruning"] for one in bases if one.settings["pruning"]):
        copies = [
            Comparison(
                Pruning.of(name),
                dense,
                Entry("pruned, not tuned", (base.measured,), machine=machine_of(store, base)),
                tuple(sorted(_entries(store, records, base.settings), key=_place)),
            )
            for base in bases
            if base.settings["pruning"] == name
        ]
        copies.sort(key=lambda one: -len(one.entries))
        comparisons += [replace(one, copy=copy) for copy, one in enumerate(copies)]
    return comparisons


def _place(entry: Entry) -> tuple[int, int, int, str, bool]:
    """Where an entry stands among the others, in whatever order they were measured."""
    method, options = entry.settings["method"], entry.settings["options"]
    group = 0 if method.startswith("spp") else 1 if entry.deployed[0].get("zeros_lost") == 0 else 2
    extras = sum(name in options for name in ("teacher", "text"))
    return group, list(METHODS).index(method), extras, str(entry.settings["equal"] or ""), entry.gave_way


def machine_of(store: Store, record: Record) -> str:
    """What a record was measured on, for readers."""
    return machine_name(store.environments[record.environment])


def model_name(store: Store) -> str:
    """The model of the last run."""
    return str(store.records[-1].settings["model"])


def machines(store: Store, capability: bool = True) -> str:
    """The processors that something was measured on, and the versions of PyTorch."""
    names = [machine_name(one) if capability else one["hardware"]["cpu"] for one in store.environments]
    versions = [one["versions"]["torch"] for one in store.environments]
    return f"{', '.join(dict.fromkeys(names))}; PyTorch {', '.join(dict.fromkeys(versions))}"


def machine_name(environment: Mapping[str, Any]) -> str:
    """The processor of an environment, and the instructions that PyTorch uses of it."""
    hardware = environment["hardware"]
    return f"{hardware['cpu']} ({hardware['cpu_capability']})"


def _entries(store: Store, records: Sequence[Record], base: Mapping[str, Any]) -> list[Entry]:
    pruning, weights = base["pruning"], base.get("weights")
    groups: dict[tuple[str, float], list[Record]] = {}
    for one in records:
        if one.kind != "tune" or not one.measured["deployments"]:
            continue
        if one.settings["pruning"] == pruning and one.settings.get("weights") == weights:
            groups.setdefault((_contender(one.settings), one.settings["rate"]), []).append(one)
    entries = []
    for (key, rate), group in groups.items():
        first = group[0]
        tried = [one for one in records if one.kind == "rate" and _contender(one.settings) == key]
        rates = {
            one.settings["rate"]: one.measured["validation_loss"]
            for one in tried
            if one.settings["pruning"] == pruning
        }
        # a pruning without its own rates takes those of another
        chosen_by = rates or {one.settings["rate"]: one.measured["validation_loss"] for one in tried}
        others = {own for contender, own in groups if contender == key} - {rate}
        gave_way = any(_loss(chosen_by, other) < _loss(chosen_by, rate) for other in others)
        for deployment in first.measured["deployments"]:
            deployed = tuple(one.measured["deployments"][deployment] for one in group)
            label = label_of(first.settings, deployment) + (f", rate {rate:g}" if gave_way else "")
            machine = machine_of(store, first)
            entries.append(
                Entry(label, deployed, first.settings, first.measured, deployment, rates, machine, gave_way)
            )
    return entries


def _loss(rates: Mapping[float, float | None], rate: float) -> float:
    loss = rates.get(rate)
    return math.inf if loss is None else loss


def _contender(settings: Mapping[str, Any]) -> str:
    return f"{contender_name(settings['method'], settings['options'])} {settings['equal']}"
