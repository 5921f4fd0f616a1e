# SPDX-License-Identifier: Apache-2.0
"""What was measured on one pruned model: entries with perplexities, accuracies, and their spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..analysis import Spread
from ..design import Pruning
from ..plan import contender_name


METRIC = "acc_norm"
MAIN_TEXT = "text"


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

    def certain_gain(self, other: Entry) -> float:
        """How much more accurate it is than another, zero within two standard errors."""
        gain, error = self.gain(other)
        return gain if abs(gain) > 2 * error else 0.0

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

    @property
    def spp(self) -> Entry | None:
        """SPP as it is compared with the others."""
        return self.find("spp") or self.find("spp_positive")

    @property
    def spp_entries(self) -> list[Entry]:
        """The entries that are SPP, with whatever settings."""
        return [entry for entry in self.entries if entry.settings["method"].startswith("spp")]

    @property
    def not_tuned_on_tasks(self) -> list[Entry]:
        """The entries that were asked questions and not tuned on any."""
        return [entry for entry in self.entries if entry.has_tasks and not entry.saw_tasks]

    @property
    def tuned_on_tasks(self) -> list[Entry]:
        """SPP, tuned on the tasks' training parts."""
        return [entry for entry in self.spp_entries if entry.saw_tasks and entry.has_tasks]

    @property
    def rivals(self) -> list[Entry]:
        """The others whose zeros are kept too, each at its best rate."""
        return [
            entry
            for entry in self.not_tuned_on_tasks
            if entry not in self.spp_entries and entry.deployed[0]["zeros_lost"] == 0 and not entry.gave_way
        ]

    def standing(self, spp: Entry) -> tuple[list[Entry], list[Entry]]:
        """The rivals that are more accurate than SPP by over two standard errors, and those that are less."""
        leads = [(spp.certain_gain(entry), entry) for entry in self.rivals]
        return [entry for lead, entry in leads if lead < 0], [entry for lead, entry in leads if lead > 0]

    @property
    def questions(self) -> int:
        """How many questions are asked."""
        return sum(len(scores[f"{METRIC} right"]) for scores in self.pruned.deployed[0]["tasks"].values())

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
