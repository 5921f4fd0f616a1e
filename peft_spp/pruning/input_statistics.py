# SPDX-License-Identifier: Apache-2.0
"""Measuring the inputs of linear layers while calibration data passes through them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from contextlib import ExitStack
from typing import Any

import torch

from .layers import LinearLayer


class InputStatistics(ABC):
    """
    Accumulates what a method wants to know of the inputs of several linear layers over all calibration tokens.

    Use it as a context manager: while it is active, forward hooks on the layers add what passes through them.

    Args:
        layers (`dict[str, LinearLayer]`): The layers to observe by their names.
    """

    def __init__(self, layers: dict[str, LinearLayer]) -> None:
        self._layers = layers
        self._sums: dict[str, torch.Tensor] = {}
        self._tokens: Counter[str] = Counter()
        self._hooks = ExitStack()

    @abstractmethod
    def of_features(self, features: torch.Tensor) -> torch.Tensor:
        """What some tokens add to the sum, given their inputs of shape `(tokens, in_features)`."""

    def __enter__(self) -> InputStatistics:
        for name, layer in self._layers.items():
            self._hooks.enter_context(layer.register_forward_pre_hook(self._make_hook(name), with_kwargs=True))
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.close()

    def _make_hook(self, name: str) -> Any:
        def add_inputs(layer: LinearLayer, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
            inputs = args[0] if args else next(iter(kwargs.values()))
            features = _exact(inputs.detach().reshape(-1, inputs.shape[-1]))
            added = self.of_features(features)
            self._tokens[name] += len(features)
            if name in self._sums:
                # in place: a Hessian may take hundreds of megabytes
                self._sums[name] += added
            else:
                self._sums[name] = added

        return add_inputs

    def without_input(self) -> list[str]:
        """The layers that no token has reached, or zeros only."""
        return [name for name in self._layers if not self._tokens[name] or not self._sums[name].any()]

    def compute(self) -> dict[str, torch.Tensor]:
        """Check and return the sums."""
        for name in self._layers:
            if not self._tokens[name]:
                raise ValueError(
                    f"No calibration data reached {name}, so the importance of its weights is unknown. Calibrate "
                    "with other data, or exclude the layer with exclude_modules."
                )
            if not self._sums[name].isfinite().all():
                raise ValueError(
                    f"The calibration inputs of {name} are not finite, or too large to square. Load the model in "
                    "bfloat16 or float32 if it is in float16, or exclude the layer with exclude_modules."
                )
            if not self._sums[name].any():
                raise ValueError(
                    f"The calibration inputs of {name} are all zero, so the importance of its weights is unknown. "
                    "Calibrate with other data, or exclude the layer with exclude_modules."
                )
        return dict(self._sums)


class InputNorms(InputStatistics):
    """
    Accumulates ‖X_j‖₂, the norm over all calibration tokens of each input feature j, for several linear layers.

    The squares are accumulated in float32, or in float64 for a model in float64.

    Args:
        layers (`dict[str, LinearLayer]`): The layers to observe by their names.
    """

    def of_features(self, features: torch.Tensor) -> torch.Tensor:
        return features.square().sum(dim=0)

    def compute(self) -> dict[str, torch.Tensor]:
        """Check and return the norms."""
        return {name: squares.sqrt() for name, squares in super().compute().items()}


class InputHessians(InputStatistics):
    """
    Accumulates 2 X Xᵀ, the Hessian of the squared error of each output, for several linear layers.

    Args:
        layers (`dict[str, LinearLayer]`): The layers to observe by their names.
    """

    def of_features(self, features: torch.Tensor) -> torch.Tensor:
        return 2 * features.T @ features


def _exact(features: torch.Tensor) -> torch.Tensor:
    return features.to(torch.promote_types(features.dtype, torch.float32))
