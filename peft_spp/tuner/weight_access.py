# SPDX-License-Identifier: Apache-2.0
"""How the weight of a layer is read and replaced, in whichever form the layer stores it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..functional import Factors, merged_weight, scaled_weight, spp_linear


class WeightAccess(ABC):
    """
    How to read and replace a weight that adapters scale.

    It keeps nothing of a layer: all of its methods take the layer. "Packed" is whatever form the layer holds its
    weight in, as one object.
    """

    parameter_name: str = "weight"
    """What the layer calls the weight."""

    is_transposed: bool = False
    """Whether the layer stores its weight as `(in_features, out_features)`."""

    is_lossless: bool = False
    """Whether every weight, zeros and all, is stored unchanged, so that merging rounds no more than on a dense one."""

    @abstractmethod
    def kind(self, layer: nn.Module) -> str:
        """
        How the weight is stored.

        Args:
            layer (`nn.Module`): The layer.

        Returns:
            `str`: The package and the format, such as `"bitsandbytes nf4"`.
        """

    @abstractmethod
    def packed(self, layer: nn.Module) -> Any:
        """
        The weight as the layer stores it.

        Args:
            layer (`nn.Module`): The layer.

        Returns:
            `Any`: The packed weight, not a copy.
        """

    @abstractmethod
    def dequantize(self, layer: nn.Module, packed: Any) -> torch.Tensor:
        """
        The weight that a packed weight stands for.

        Args:
            layer (`nn.Module`): The layer.
            packed (`Any`): A packed weight of this layer.

        Returns:
            `torch.Tensor`: Floating, shape `(out_features, in_features)`, on the device where the layer is. A new
            tensor if the weight is quantized.
        """

    @abstractmethod
    def quantize(self, layer: nn.Module, weight: torch.Tensor) -> Any:
        """
        Quantize a weight as that of the layer is quantized.

        Args:
            layer (`nn.Module`): The layer; it is not changed.
            weight (`torch.Tensor`): Of the shape and dtype that [`dequantize`] gives.

        Returns:
            `Any`: The packed weight.

        Raises:
            ValueError: If layers of this kind cannot be quantized again.
        """

    @abstractmethod
    def put(self, layer: nn.Module, packed: Any) -> None:
        """
        Replace the weight of a layer, on the device where the layer is.

        Args:
            layer (`nn.Module`): The layer.
            packed (`Any`): The packed weight.
        """

    @abstractmethod
    def forward_is_known(self, layer: nn.Module) -> bool:
        """
        Whether the layer's forward method multiplies by the weight and does nothing else.

        Args:
            layer (`nn.Module`): The layer.

        Returns:
            `bool`: `False` for a subclass that has its own forward method.
        """

    @abstractmethod
    def linear(
        self,
        layer: nn.Module,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        factors: Sequence[Factors],
        identity: bool = True,
    ) -> torch.Tensor:
        """
        The layer with W' = W ⊙ (1 + Σ s · P(A) ⊙ B) in the weight's place.

        Args:
            layer (`nn.Module`): The layer.
            x (`torch.Tensor`): The input, shape `(*, in_features)`.
            bias (`torch.Tensor`, *optional*): shape `(out_features,)`.
            factors (`Sequence[Factors]`): The factors of each adapter.
            identity (`bool`): With `False` the 1 is left out.

        Returns:
            `torch.Tensor`: shape `(*, out_features)`, in the dtype of the matmul.
        """

    def scaled(self, layer: nn.Module, factors: Sequence[Factors]) -> torch.Tensor:
        """
        W' as a dense tensor, differentiable in the factors.

        Args:
            layer (`nn.Module`): The layer.
            factors (`Sequence[Factors]`): The factors of each adapter.

        Returns:
            `torch.Tensor`: In the form of a dense weight of the layer.
        """
        return scaled_weight(self.dequantize(layer, self.packed(layer)), factors)

    def copy(self, packed: Any) -> Any:
        """
        A packed weight to come back to after a merge.

        Args:
            packed (`Any`): The packed weight.

        Returns:
            `Any`: By default the same object, for layers whose packed weight is never changed in place.
        """
        return packed

    def merged(self, layer: nn.Module, packed: Any, factors: Sequence[Factors]) -> Any:
        """
        Merge factors into a packed weight.

        Args:
            layer (`nn.Module`): The layer; it is not changed.
            packed (`Any`): A packed weight of this layer; it is not changed.
            factors (`Sequence[Factors]`): The factors of each adapter to merge.

        Returns:
            `Any`: The packed merged weight.
        """
        return self.quantize(layer, merged_weight(self.dequantize(layer, packed), factors))

    def stored(self, weight: torch.Tensor) -> torch.Tensor:
        """
        A dense weight in the shape that the layer gives to dense weights.

        Args:
            weight (`torch.Tensor`): shape `(out_features, in_features)`.

        Returns:
            `torch.Tensor`: By default the weight itself.
        """
        return weight

    def numbers(self, packed: Any) -> torch.Tensor:
        """
        The stored numbers of a packed weight. Only lossless ones are asked for it.

        Args:
            packed (`Any`): The packed weight.

        Returns:
            `torch.Tensor`: In the shape of the layer's parameter.
        """
        numbers: torch.Tensor = packed
        return numbers


class Plain(WeightAccess):
    """
    A weight that is an ordinary parameter, or a stack of the weights of all experts.

    Args:
        parameter_name (`str`): What the layer calls it.
        is_transposed (`bool`): Whether it is stored as (in_features, out_features).
    """

    is_lossless = True

    def __init__(self, parameter_name: str = "weight", is_transposed: bool = False) -> None:
        self.parameter_name = parameter_name
        self.is_transposed = is_transposed

    def kind(self, layer: nn.Module) -> str:
        return "dense"

    def packed(self, layer: nn.Module) -> torch.Tensor:
        return self._parameter(layer).detach()

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """The layer's parameter as (outputs, inputs)."""
        # a flattened shard has nothing to turn
        return weight.transpose(-2, -1) if self.is_transposed and weight.ndim > 1 else weight

    def stored(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.transpose(-2, -1) if self.is_transposed else weight

    def dequantize(self, layer: nn.Module, packed: torch.Tensor) -> torch.Tensor:
        weight = self._parameter(layer)
        return self.rows(packed.to(weight.device, weight.dtype))

    def quantize(self, layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
        return self.stored(weight)

    def put(self, layer: nn.Module, packed: torch.Tensor) -> None:
        # in place: an engine that shards parameters, and whoever holds this one, sees the new values
        self._parameter(layer).data.copy_(packed)

    def copy(self, packed: torch.Tensor) -> torch.Tensor:
        return packed.to("cpu", copy=True)

    def forward_is_known(self, layer: nn.Module) -> bool:
        return type(layer).forward in (nn.Linear.forward, Conv1D.forward)

    def linear(
        self,
        layer: nn.Module,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        factors: Sequence[Factors],
        identity: bool = True,
    ) -> torch.Tensor:
        return spp_linear(x, self.rows(self._parameter(layer)), bias, factors, identity=identity)

    def scaled(self, layer: nn.Module, factors: Sequence[Factors]) -> torch.Tensor:
        return self.scale(self._parameter(layer), factors)

    def replacement(self, module: nn.Module, factors: Sequence[Factors]) -> Callable[[torch.Tensor], torch.Tensor]:
        """What makes W' of the parameter, for code of the module that reads it."""
        return partial(self.scale, factors=factors)

    def scale(self, weight: torch.Tensor, factors: Sequence[Factors]) -> torch.Tensor:
        """W' of a weight in the layer's own form, in the same form."""
        return self.stored(scaled_weight(self.rows(weight), factors))

    def _parameter(self, layer: nn.Module) -> torch.Tensor:
        weight: torch.Tensor = getattr(layer, self.parameter_name)
        return weight
