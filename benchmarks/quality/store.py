# SPDX-License-Identifier: Apache-2.0
"""The measurements that are done: one JSON file, rewritten as a whole after each of them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peft_spp.durable import write_text


UNSTABLE = "unstable"


@dataclass(frozen=True)
class Record:
    """A measurement.

    Args:
        kind (`str`):
            `"base"`, `"profile"`, `"tune"`, `"rate"` for a run that chooses a learning rate, where that is shorter, or
            `"unstable"` for one that ended worse than the shorter one with the same rate.
        settings (`dict[str, Any]`): What tells it from all others of its kind. `weights`, where they are there, tell
            which copy of the pruned model it was, as each machine prunes its own.
        measured (`dict[str, Any]`): What came out. Infinite and NaN are `None`.
        environment (`int`): Where it was measured: the number of one of the store's environments.
    """

    kind: str
    settings: dict[str, Any]
    measured: dict[str, Any]
    environment: int

    def is_of(self, kind: str, settings: Mapping[str, Any]) -> bool:
        """Whether it is the measurement with these settings, on any copy of the pruned model if they name none."""
        own = self.settings if "weights" in settings else {k: v for k, v in self.settings.items() if k != "weights"}
        return key_of(self.kind, own) == key_of(kind, settings)


@dataclass
class Store:
    """
    The measurements of a suite.

    Args:
        suite (`str`): The name of the suite.
        path (`Path`): The file.
        about (`dict[str, Any]`): What is common to all, for readers.
        environments (`list[dict[str, Any]]`): Of each run, as the harness describes it.
        records (`list[Record]`): In the order they were measured.
    """

    suite: str
    path: Path
    about: dict[str, Any] = field(default_factory=dict)
    environments: list[dict[str, Any]] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    _new_environment: dict[str, Any] | None = None

    @classmethod
    def open(cls, path: Path, suite: str) -> Store:
        """
        The store of a file, empty if that is not there.

        Raises:
            ValueError: If the file holds something else.
        """
        if not path.is_file():
            return cls(suite, path)
        content = json.loads(path.read_text(encoding="utf-8"))
        found = (content.get("benchmark"), content.get("suite")) if isinstance(content, dict) else None
        if found != ("quality", suite):
            raise ValueError(f"{path} does not hold results of the suite {suite!r}, but of {found}: move it away.")
        records = [Record(**record) for record in content["records"]]
        return cls(suite, path, content["about"], content["environments"], records)

    def begin(self, environment: dict[str, Any], about: dict[str, Any]) -> None:
        """
        Begin a run. What is measured from now on is measured there; a run that measures nothing leaves no trace.

        Raises:
            ValueError: If the tasks of the runs before had other questions.
        """
        self._refuse_other_questions(about, "This run")
        self._new_environment = environment
        self.about = {**about, "complete": False}

    def finish(self, write: bool = True) -> None:
        """Note that nothing is missing: of several processes one is to `write`."""
        self.about["complete"] = True
        if write:
            self.save()

    def find(self, kind: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """
        What was measured with these settings, on whichever copy of the pruned model if they do not say; `None` if it
        has not been.
        """
        return next((one.measured for one in self.records if one.is_of(kind, settings)), None)

    def add(self, kind: str, settings: Mapping[str, Any], measured: Mapping[str, Any], write: bool = True) -> None:
        """Keep a measurement, on the disk when this returns: of several processes one is to `write`."""
        if self._new_environment is not None:
            self.environments.append(self._new_environment)
            self._new_environment = None
        self.records.append(Record(kind, dict(settings), dict(measured), len(self.environments) - 1))
        if write:
            self.save()

    def take(self, other: Store) -> None:
        """
        Add what another store has measured and this one has not, with where it was measured.

        Raises:
            ValueError: If that is another base model, or a run that this store has with another number of steps, or
                the tasks of that store have other questions. Nothing is added then.
        """
        self._refuse_other_questions(other.about, str(other.path))
        bases, theirs = ({one.settings["base"] for one in some.records} for some in (self, other))
        if bases and theirs - bases:
            raise ValueError(f"{other.path} has measurements of another base model: {', '.join(theirs - bases)}")
        # a run that turned out unstable is the same run
        known = {_run_key(one) for one in self.records}
        new = [one for one in other.records if _run_key(one) not in known]
        tuned = {_contender_key(one): one.settings for one in self.records if one.kind == "tune"}
        for one in new:
            if one.kind == "tune" and (own := tuned.get(_contender_key(one))):
                raise ValueError(f"{other.path} has the run {one.settings}, and {self.path} has it as {own}")
        numbers: dict[int, int] = {}
        for one in new:
            if one.environment not in numbers:
                self.environments.append(other.environments[one.environment])
                numbers[one.environment] = len(self.environments) - 1
            self.records.append(replace(one, environment=numbers[one.environment]))
        self.about = {**other.about, **self.about}

    def _refuse_other_questions(self, about: Mapping[str, Any], name: str) -> None:
        own, other = self.about.get("questions"), about.get("questions")
        if own and other and own != other:
            raise ValueError(f"{name} asks other questions than {self.path} has answers to: use another --output-dir.")

    def relabel(self, kind: str, settings: Mapping[str, Any], new: str, write: bool = True) -> None:
        """Give a measurement another kind: of several processes one is to `write`."""
        self.records = [replace(one, kind=new) if one.is_of(kind, settings) else one for one in self.records]
        if write:
            self.save()

    def save(self) -> None:
        """Write the file: it is complete or as it was."""
        content = {
            "benchmark": "quality",
            "suite": self.suite,
            "about": self.about,
            "environments": self.environments,
            "records": [vars(record) for record in self.records],
        }
        text = json.dumps(content, indent=1, allow_nan=False)
        # a list of numbers, as of the questions of a task, is a line
        text = _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)
        write_text(self.path, text + "\n")


_NUMBERS = re.compile(r"\[\n\s+([-+.,\de\s]+?)\n\s+\]")


def key_of(kind: str, settings: Mapping[str, Any]) -> str:
    """The same for the same settings, whatever their order."""
    return f"{kind} {json.dumps(settings, sort_keys=True)}"


def _run_key(record: Record) -> str:
    return key_of("tune" if record.kind == UNSTABLE else record.kind, record.settings)


def _contender_key(record: Record) -> str:
    """The same for runs of one contender, rate and seed, whatever their steps."""
    return key_of("", {name: value for name, value in record.settings.items() if name != "steps"})
