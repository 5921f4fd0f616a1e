# SPDX-License-Identifier: Apache-2.0
"""What tells the pruning methods apart: what they measure, and how they prune one layer."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..sparsity import NMPattern
from .input_statistics import InputStatistics
from .layers import PrunableLayer, weight_matrix
from .mask import check_pruning_request, num_to_prune


@dataclass(frozen=True)
class PruningMethod(ABC):
    """
    A method and what it is asked for. A method that has options derives from them too (`options.py`).

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
    def prune(self, name: str, layer: PrunableLayer, statistic: torch.Tensor | None) -> None:
        """
        Prune one layer in place.

        Args:
            name (`str`): The name of the layer, for messages.
            layer (`PrunableLayer`): The layer.
            statistic (`torch.Tensor`, *optional*): What [`statistics`] has measured for it.
        """

    @abstractmethod
    def comparison_size(self, out_features: int, in_features: int) -> int:
        """With `sparsity`, how many weights of a layer are compared at once."""

    def check_sparsity(self, layers: dict[str, PrunableLayer]) -> None:
        """
        Check that the sparsity prunes at least one of the weights that are compared.

        Args:
            layers (`dict[str, PrunableLayer]`): The layers to prune, by their names. A warning counts those that
                the sparsity leaves dense.

        Raises:
            ValueError: If it leaves all of them dense.
        """
        if not self.sparsity:
            return
        sizes = {name: self.comparison_size(*weight_matrix(layer).shape) for name, layer in layers.items()}
        dense = [name for name, size in sizes.items() if not num_to_prune(self.sparsity, size)]
        if not dense:
            return
        size = sizes[dense[0]]
        message = (
            f"sparsity={self.sparsity:g} of the {size} weights that {self.name} compares at once rounds to 0 in "
            f"{dense[0]}, so {len(dense)} of {len(layers)} layers stay dense. "
            + (f"One of {size} is sparsity={1 / size:.2g}." if size > 1 else "Exclude it with exclude_modules.")
        )
        if len(dense) == len(layers):
            raise ValueError(message)
        warnings.warn(message, stacklevel=3)

    @property
    def request(self) -> str:
        """What is asked for, in words."""
        if self.pattern is not None:
            return str(self.pattern)
        return f"{100 * (self.sparsity or 0.0):g} %"
