# SPDX-License-Identifier: Apache-2.0
"""What a run says of the zeros of its base model."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..callbacks import SPPGuardCallback
from ..reports import percent
from ..sparsity import sparsity_report
from .processes import is_first_process


@dataclass(frozen=True)
class BaseReport:
    """The zeros of the layers that are adapted."""

    patterns: Counter[str]  # how many layers have each pattern
    zeros: int  # the zeros of all of them
    numel: int  # the weights of all of them
    dense: int  # how many of the layers have no zeros

    @classmethod
    def of(cls, layers: Iterable[Any]) -> BaseReport:
        """Sum up masks or sparsities of layers."""
        listed = [(layer.pattern, layer.zeros, math.prod(layer.shape)) for layer in layers]
        return cls(
            Counter(pattern for pattern, _, _ in listed),
            sum(zeros for _, zeros, _ in listed),
            sum(numel for _, _, numel in listed),
            sum(not zeros for _, zeros, _ in listed),
        )

    def lines(self) -> list[str]:
        """The line of the header, and a warning if layers have no zeros to keep."""
        layers = self.patterns.total()
        if not layers:
            return []
        patterns = ", ".join(
            pattern if len(self.patterns) == 1 else f"{pattern} in {count} layers"
            for pattern, count in self.patterns.most_common()
        )
        lines = [f"Base:       {patterns}, {percent(self.zeros / self.numel).replace('.00 %', ' %')} zero"]
        if self.dense:
            lines.append(
                f"Warning: {self.dense} of {layers} adapted layers have no zeros, so SPP has nothing to preserve "
                "there. Prune the model first (`peft-spp prune`)."
            )
        return lines


def sparsity_on_disk(model: str, layers: Sequence[str]) -> BaseReport | None:
    """The zeros of adapted layers in the files of a model."""
    folder = Path(model).expanduser()
    if not any(folder.glob("*.safetensors")):
        return None
    report = sparsity_report(folder)
    return BaseReport.of(report[name] for name in layers if name in report)


class SparsityCallback(TrainerCallback):
    """Says at the start of the training how sparse the base model is."""

    def __init__(self, guard: SPPGuardCallback) -> None:
        self._guard = guard

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if is_first_process():
            for line in BaseReport.of(self._guard.base_masks.values()).lines():
                print(line, file=sys.stderr)
