# SPDX-License-Identifier: Apache-2.0
"""What a quantization backend has to tell about a linear layer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import nn

from ...functional import Factors, spp_linear_dequantized
from ..weight_access import WeightAccess


class Backend(WeightAccess):
    """
    How to recognize one family of quantized linear layers, and how to read and replace their weights.

    A backend keeps nothing: all of its methods take the layer. "Packed" is whatever form the layer holds its quantized
    weight in, as one object; it is never changed in place.
    """

    package: str
    """The Python package that the layers come from."""

    @abstractmethod
    def matches(self, layer: nn.Module) -> bool:
        """
        Whether a layer is one of this family. Must not import the package: a layer of it has imported it.

        Args:
            layer (`nn.Module`): Any module.

        Returns:
            `bool`: Whether this backend serves it.
        """

    def check(self, layer: nn.Module) -> None:
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
        return spp_linear_dequantized(
            x,
            lambda: self.dequantize(layer, self.packed(layer)),
            bias,
            factors,
            identity=identity,
            dtype=self.input_dtype(layer, x),
        )
