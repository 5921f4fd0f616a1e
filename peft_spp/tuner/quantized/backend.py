# SPDX-License-Identifier: Apache-2.0
"""What a quantization backend has to tell about a linear layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...functional import Factors, scaled_weight, spp_linear_dequantized


class Backend(ABC):
    """
    How to read and replace the weight of one family of quantized linear layers.

    A backend keeps nothing: all of its methods take the layer. "Packed" is whatever form the layer holds its quantized
    weight in, as one object; it is never changed in place.
    """

    package: str
    """The Python package that the layers come from."""

    is_lossless: bool = False
    """Whether every weight, zeros and all, is stored unchanged, so that merging rounds no more than on a dense one."""

    @abstractmethod
    def matches(self, layer: nn.Module) -> bool:
        """
        Whether a layer is one of this family. Must not import the package: a layer of it has imported it.

        Args:
            layer (`nn.Module`): Any module.

        Returns:
            `bool`: Whether this backend serves it.
        """

    @abstractmethod
    def kind(self, layer: nn.Module) -> str:
        """
        How the weight is quantized.

        Args:
            layer (`nn.Module`): A layer that matches.

        Returns:
            `str`: The package and the format, such as `"bitsandbytes nf4"`.
        """

    @abstractmethod
    def packed(self, layer: nn.Module) -> Any:
        """
        The quantized weight.

        Args:
            layer (`nn.Module`): A layer that matches.

        Returns:
            `Any`: The packed weight, not a copy.
        """

    @abstractmethod
    def dequantize(self, layer: nn.Module, packed: Any) -> torch.Tensor:
        """
        The weight that a packed weight stands for.

        Args:
            layer (`nn.Module`): A layer that matches.
            packed (`Any`): A packed weight of this layer.

        Returns:
            `torch.Tensor`: Floating, shape `(out_features, in_features)`, a new tensor.
        """

    @abstractmethod
    def quantize(self, layer: nn.Module, weight: torch.Tensor) -> Any:
        """
        Quantize a weight as that of the layer is quantized.

        Args:
            layer (`nn.Module`): A layer that matches; it is not changed.
            weight (`torch.Tensor`): Of the shape and dtype that [`dequantize`] gives.

        Returns:
            `Any`: The packed weight.

        Raises:
            ValueError: If layers of this kind cannot be quantized again.
        """

    @abstractmethod
    def put(self, layer: nn.Module, packed: Any) -> None:
        """
        Replace the quantized weight of a layer, on the device where the layer is.

        Args:
            layer (`nn.Module`): A layer that matches.
            packed (`Any`): The packed weight.
        """

    def check(self, layer: nn.Module) -> None:  # noqa: B027  (most families have nothing to check)
        """
        Check that the layer can be adapted.

        Args:
            layer (`nn.Module`): A layer that matches.

        Raises:
            ValueError: If it cannot.
        """

    def input_dtype(self, layer: nn.Module, x: torch.Tensor) -> torch.dtype:
        """
        The dtype that the layer casts its input to before the matmul.

        Args:
            layer (`nn.Module`): A layer that matches.
            x (`torch.Tensor`): The input.

        Returns:
            `torch.dtype`: By default the input's own.
        """
        return x.dtype

    def forward_is_known(self, layer: nn.Module) -> bool:
        """
        Whether the layer's forward method is the package's, which multiplies by the weight and does nothing else.

        Args:
            layer (`nn.Module`): A layer that matches.

        Returns:
            `bool`: `False` for a subclass that has its own forward method.
        """
        defined_in = type(layer).forward.__module__
        return any(f"{defined_in}.".startswith(f"{package}.") for package in (self.package, "torch"))

    def linear(
        self,
        layer: nn.Module,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        factors: Sequence[Factors],
        identity: bool = True,
    ) -> torch.Tensor:
        """
        The layer with W' = W ⊙ (1 + Σ s · P(A) ⊙ B) in the weight's place; see [`spp_linear_dequantized`].

        Args:
            layer (`nn.Module`): A layer that matches.
            x (`torch.Tensor`): The input, shape `(*, in_features)`.
            bias (`torch.Tensor`, *optional*): shape `(out_features,)`.
            factors (`Sequence[Factors]`): The factors of each adapter.
            identity (`bool`): With `False` the 1 is left out.

        Returns:
            `torch.Tensor`: shape `(*, out_features)`, in the dtype of the matmul.
        """
        return spp_linear_dequantized(
            x,
            lambda: self.dequantize(layer, self.packed(layer)),
            bias,
            factors,
            identity=identity,
            dtype=self.input_dtype(layer, x),
        )

    def scaled(self, layer: nn.Module, factors: Sequence[Factors]) -> torch.Tensor:
        """
        W' as a dense tensor, differentiable in the factors.

        Args:
            layer (`nn.Module`): A layer that matches.
            factors (`Sequence[Factors]`): The factors of each adapter.

        Returns:
            `torch.Tensor`: shape `(out_features, in_features)`.
        """
        return scaled_weight(self.dequantize(layer, self.packed(layer)), factors)

    def copy(self, packed: Any) -> Any:
        """
        A packed weight to come back to after a merge.

        Args:
            packed (`Any`): The packed weight.

        Returns:
            `Any`: By default the same object: it is never changed in place.
        """
        return packed

    def merged(self, packed: Any, factors: Sequence[Factors]) -> tuple[Any, torch.Tensor]:
        """
        Merge factors into a packed weight. Only a lossless backend can without quantizing again.

        Args:
            packed (`Any`): The packed weight; it is not changed.
            factors (`Sequence[Factors]`): The factors of each adapter to merge.

        Returns:
            `tuple[Any, torch.Tensor]`: The packed merged weight, and its values in any shape.
        """
        raise NotImplementedError(f"{type(self).__name__} quantizes a merged weight again")
