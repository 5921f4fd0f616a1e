# SPDX-License-Identifier: Apache-2.0
"""What tells the pruning methods apart: what they measure, and how they prune one layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ..sparsity import NMPattern
from .input_statistics import InputStatistics
from .layers import LinearLayer
from .mask import check_pruning_request


def option(default: Any, help: str) -> Any:
    """A field of a method: an option of its own, with the help that the command prints."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class PruningMethod(ABC):
    """
    A method and what it is asked for. Fields that a method adds, with [`option`], are its options.

    Args:
        pattern (`str` or `NMPattern`, *optional*): N:M pattern such as `"2:4"`.
        sparsity (`float`, *optional*): Fraction of the weights to prune, in [0, 1).

    Raises:
        ValueError: If not exactly one of both is given, or it is malformed.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    statistics: ClassVar[type[InputStatistics] | None]
    """What the method measures of the inputs of a layer; `None` if it does without calibration data."""

    pattern: str | NMPattern | None = None
    sparsity: float | None = None

    def __post_init__(self) -> None:
        check_pruning_request(self.pattern, self.sparsity)

    @abstractmethod
    def prune(self, name: str, layer: LinearLayer, statistic: torch.Tensor | None) -> None:
        """
        Prune one layer in place.

        Args:
            name (`str`): The name of the layer, for messages.
            layer (`LinearLayer`): The layer.
            statistic (`torch.Tensor`, *optional*): What [`statistics`] has measured for it.
        """

    @property
    def request(self) -> str:
        """What is asked for, in words."""
        if self.pattern is not None:
            return str(self.pattern)
        return f"{100 * (self.sparsity or 0.0):g} %"
