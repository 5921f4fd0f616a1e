# SPDX-License-Identifier: Apache-2.0
"""Measuring the inputs of linear layers, experts included, while calibration data passes through them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from contextlib import ExitStack
from typing import Any

import torch

from .experts import Expert, ExpertInputs, by_stack
from .layers import PrunableLayer, weight_matrix


FEW_TOKENS = 16
"""An expert that fewer tokens reach is pruned by magnitude: they tell too little of its inputs."""


class InputStatistics(ABC):
    """
    Accumulates what a method wants to know of the inputs of several linear layers over all calibration tokens.

    Use it as a context manager: while it is active, forward hooks on the layers add what passes through them, and
    what experts are multiplied with is added too.

    Args:
        layers (`dict[str, PrunableLayer]`): The layers to observe by their names.
    """

    def __init__(self, layers: dict[str, PrunableLayer]) -> None:
        self._layers = layers
        self._experts = {name: layer for name, layer in layers.items() if isinstance(layer, Expert)}
        self._sums: dict[str, torch.Tensor] = {}
        self._tokens: Counter[str] = Counter()
        self._hooks = ExitStack()

    @abstractmethod
    def of_features(self, features: torch.Tensor) -> torch.Tensor:
        """What some tokens add to the sum, given their inputs of shape `(tokens, in_features)`."""

    @abstractmethod
    def of_equal_inputs(self, in_features: int) -> torch.Tensor:
        """The sum if all inputs had the same norm and nothing in common, so that the weights alone decide."""

    def __enter__(self) -> InputStatistics:
        for name, layer in self._layers.items():
            if not isinstance(layer, Expert):
                self._hooks.enter_context(layer.register_forward_pre_hook(self._make_hook(name), with_kwargs=True))
        if self._experts:
            self._hooks.enter_context(ExpertInputs(self._experts, self._add))
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.close()

    def _make_hook(self, name: str) -> Any:
        def add_inputs(layer: PrunableLayer, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
            inputs = args[0] if args else next(iter(kwargs.values()))
            self._add(name, inputs)

        return add_inputs

    def _add(self, name: str, inputs: torch.Tensor) -> None:
        features = _exact(inputs.detach().reshape(-1, inputs.shape[-1]))
        # the model may run in autocast, which would multiply in half precision
        with torch.autocast(features.device.type, enabled=False):
            added = self.of_features(features)
        self._tokens[name] += len(features)
        if name in self._sums:
            # in place: a Hessian may take hundreds of megabytes
            self._sums[name] += added
        else:
            self._sums[name] = added

    def without_input(self) -> list[str]:
        """The layers, and the stacks of experts, that no token has reached, or zeros only."""
        layers = [name for name in self._layers if name not in self._experts and not self._has_input(name)]
        stacks = by_stack(self._experts)
        return layers + [name for name, experts in stacks.items() if not any(map(self._has_input, experts))]

    def rarely_reached(self) -> list[str]:
        """The experts that too few tokens have reached to go by their inputs."""
        return [name for name in self._experts if self._tokens[name] < FEW_TOKENS or not self._has_input(name)]

    def _has_input(self, name: str) -> bool:
        return bool(self._tokens[name]) and bool(self._sums[name].any())

    def compute(self) -> dict[str, torch.Tensor]:
        """Check and return the sums. For experts that are rarely reached, they are those of equal inputs."""
        for name in self._layers:
            if name not in self._experts and not self._tokens[name]:
                raise ValueError(
                    f"No calibration data reached {name}, so the importance of its weights is unknown. Calibrate "
                    "with other data, or exclude the layer with exclude_modules."
                )
            if name in self._sums and not self._sums[name].isfinite().all():
                raise ValueError(
                    f"The calibration inputs of {name} are not finite, or too large to square. Load the model in "
                    "bfloat16 or float32 if it is in float16, or exclude the layer with exclude_modules."
                )
            if name not in self._experts and not self._sums[name].any():
                raise ValueError(
                    f"The calibration inputs of {name} are all zero, so the importance of its weights is unknown. "
                    "Calibrate with other data, or exclude the layer with exclude_modules."
                )
        self._check_stacks()
        return {**self._sums, **self._of_equal_inputs()}

    def _check_stacks(self) -> None:
        for stack, names in by_stack(self._experts).items():
            if not any(self._tokens[name] for name in names):
                module = type(self._experts[names[0]].module).__name__
                raise ValueError(
                    f"No calibration data was seen to reach the experts in {stack}: none was routed to them, or the "
                    f"forward of {module} does not multiply with the weight of each. Exclude them with "
                    f"exclude_modules=[{stack.removesuffix('.weight')!r}], or prune the model by magnitude."
                )

    def _of_equal_inputs(self) -> dict[str, torch.Tensor]:
        of_kind: dict[tuple[int, torch.dtype, torch.device], torch.Tensor] = {}
        found = {}
        for name in self.rarely_reached():
            weight = weight_matrix(self._experts[name])
            kind = (weight.shape[1], torch.promote_types(weight.dtype, torch.float32), weight.device)
            if kind not in of_kind:
                in_features, dtype, device = kind
                # one for all, since a Hessian may take hundreds of megabytes
                of_kind[kind] = self.of_equal_inputs(in_features).to(device, dtype)
            found[name] = of_kind[kind]
        return found


class InputNorms(InputStatistics):
    """
    Accumulates ‖X_j‖₂, the norm over all calibration tokens of each input feature j, for several linear layers.

    The squares are accumulated in float32, or in float64 for a model in float64.
    """

    def of_features(self, features: torch.Tensor) -> torch.Tensor:
        return features.square().sum(dim=0)

    def of_equal_inputs(self, in_features: int) -> torch.Tensor:
        return torch.ones(in_features)

    def compute(self) -> dict[str, torch.Tensor]:
        """Check and return the norms."""
        return {name: squares.sqrt() for name, squares in super().compute().items()}


class InputHessians(InputStatistics):
    """Accumulates 2 X Xᵀ, the Hessian of the squared error of each output, for several linear layers."""

    def of_features(self, features: torch.Tensor) -> torch.Tensor:
        return 2 * features.T @ features

    def of_equal_inputs(self, in_features: int) -> torch.Tensor:
        return torch.eye(in_features)


def _exact(features: torch.Tensor) -> torch.Tensor:
    return features.to(torch.promote_types(features.dtype, torch.float32))
