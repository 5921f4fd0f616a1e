# SPDX-License-Identifier: Apache-2.0
"""Results of a benchmark: all raw samples, what they depend on, and their summaries, as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft_spp.durable import write_text

from .statistics import Summary, ratio_summary, summarize


@dataclass
class Case:
    """What was measured side by side under the same conditions.

    Args:
        parameters (`dict[str, Any]`): What tells this case from the others, such as shape, tokens and precision.
        samples (`dict[str, list[float]]`):
            Seconds by contestant; the i-th samples of all contestants are of the same round.
        values (`dict[str, dict[str, float]]`): What is no time, by contestant: bytes, numbers of parameters.
    """

    parameters: dict[str, Any]
    samples: dict[str, list[float]] = field(default_factory=dict)
    values: dict[str, dict[str, float]] = field(default_factory=dict)

    def summary(self, name: str) -> Summary:
        """The times of a contestant, summarized."""
        return summarize(self.samples[name])

    def ratio(self, name: str, reference: str) -> Summary:
        """The times of a contestant over those of another, round by round, summarized."""
        return ratio_summary(self.samples, name, reference)


@dataclass
class BenchmarkResult:
    """A benchmark's result.

    Args:
        benchmark (`str`): The name of the benchmark.
        reference (`str`): The contestant that ratios are taken to.
        settings (`dict[str, Any]`): The settings common to all cases.
        environment (`dict[str, Any]`): As [`describe_environment`] gives it.
        cases (`list[Case]`): In the order they were measured.
    """

    benchmark: str
    reference: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    cases: list[Case] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write the result as JSON, with the summaries of all samples and of their ratios to the reference."""
        content = asdict(self)
        for case, written in zip(self.cases, content["cases"], strict=True):
            written["summaries"] = {name: asdict(case.summary(name)) for name in case.samples}
            if self.reference in case.samples:
                written["ratios"] = {name: asdict(case.ratio(name, self.reference)) for name in case.samples}
        write_text(path, json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path, benchmark: str) -> BenchmarkResult:
        """
        Read a result back.

        Args:
            path (`Path`): The JSON file.
            benchmark (`str`): The benchmark that it must be of.

        Raises:
            ValueError: If the file holds something else.
        """
        content = json.loads(path.read_text())
        found = content.get("benchmark") if isinstance(content, dict) else None
        if found != benchmark:
            raise ValueError(f"{path} is not a result of the benchmark {benchmark!r}, but of {found!r}.")
        cases = [Case(case["parameters"], case["samples"], case["values"]) for case in content["cases"]]
        return cls(benchmark, content["reference"], content["settings"], content["environment"], cases)


def result_path(output_dir: Path, machine: str, benchmark: str, quick: bool = False) -> Path:
    """Where a result goes: `<output_dir>/<machine>/<benchmark>.json`, apart from it that of a quick run."""
    return output_dir / machine / f"{benchmark}{'-quick' if quick else ''}.json"
