# SPDX-License-Identifier: Apache-2.0
"""The linear layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..functional.bitmask import (
    Compressed,
    bitmask_bytes,
    check_compressed,
    count_row_offsets,
)
from ..functional.compressed import compress, compressed_linear, decompress
from .experts import CompressedExperts, put_dense_stacks
from .row_offsets import Counted


class CompressedLinear(nn.Linear):
    """
    A frozen linear layer that stores no zeros of its weight.

    `weight` holds the values that are not `+0.0`, row by row, shape `(stored,)`, and the buffer `bitmask` says where
    they belong; see [`peft_spp.functional.bitmask`]. They are a parameter and a buffer, and not a subclass of
    `torch.Tensor`: so `state_dict`, safetensors, device placement, `torch.compile` and PEFT treat them as what they
    are, as with bitsandbytes' layers. Where each row begins is counted from the bitmask whenever that changes.

    Args:
        in_features (`int`): The size of an input row.
        out_features (`int`): The size of an output row.
        bias (`bool`): Whether the layer adds a bias.
        dtype (`torch.dtype`, *optional*): The dtype of the values.
        device (`torch.device`, *optional*): Where to create the tensors. The layer is made without any value: they
            come from [`from_linear`], from a state dict, or from [`put`].
    """

    bitmask: Tensor
    row_offsets: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        with torch.device("meta"):
            super().__init__(in_features, out_features, bias=bias, dtype=dtype)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), requires_grad=False)
        bitmask = torch.zeros(out_features, bitmask_bytes(in_features), dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False)
        self.register_buffer("bitmask", bitmask)
        self.register_buffer("row_offsets", count_row_offsets(bitmask), persistent=False)
        self._counted = Counted()

    @classmethod
    def from_linear(cls, layer: nn.Linear) -> CompressedLinear:
        """
        The layer that a dense one becomes.

        Args:
            layer (`nn.Linear`): The dense layer; it is not changed, and shares its bias with the new one.

        Returns:
            `CompressedLinear`: A new layer, of the same mode.

        Raises:
            ValueError: If the dtype is not float32, bfloat16 or float16.
        """
        result = cls.without_values(layer)
        result.put(compress(layer.weight))
        return result

    @classmethod
    def without_values(cls, layer: nn.Linear) -> CompressedLinear:
        """
        The layer that a dense one becomes, before its weight is there; see [`put`].

        Args:
            layer (`nn.Linear`): The dense layer, which shares its bias with the new one.

        Returns:
            `CompressedLinear`: A new layer, of the same mode, with its bitmask on the meta device.
        """
        dtype = layer.weight.dtype
        result = cls(layer.in_features, layer.out_features, bias=False, dtype=dtype, device="meta")
        result.bias = layer.bias
        return result.train(layer.training)

    def to_linear(self) -> nn.Linear:
        """
        The dense layer that this one was.

        Returns:
            `nn.Linear`: A new layer, of the same mode, which shares the bias.
        """
        with torch.device("meta"):
            result = nn.Linear(self.in_features, self.out_features, bias=False)
        result.weight = nn.Parameter(self.dequantize())
        result.bias = self.bias
        return result.train(self.training)

    @property
    def compressed(self) -> Compressed:
        """
        The weight, not a copy.

        Raises:
            ValueError: If the values or the bitmask were written or replaced such that they do not fit any more.
        """
        row_offsets = self._counted.row_offsets(
            self.weight, self.bitmask, self.row_offsets, self.in_features, "the weight of this layer"
        )
        return Compressed(self.weight, self.bitmask, row_offsets, self.in_features)

    def put(self, compressed: Compressed) -> None:
        """
        Replace the weight.

        Args:
            compressed ([`Compressed`]): The new weight, of the layer's shape.
        """
        self.weight = nn.Parameter(compressed.values, requires_grad=False)
        self.bitmask, self.row_offsets = compressed.bitmask, compressed.row_offsets
        self._counted.note(self.weight, self.bitmask)

    def dequantize(self) -> Tensor:
        """
        The dense weight.

        Returns:
            `torch.Tensor`: shape `(out_features, in_features)`, a new tensor.
        """
        return decompress(self.compressed)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # which is how an attribute is set, as by torchao's quantize_: it would fail in the next forward pass
        if name == "weight" and is_traceable_wrapper_subclass(param) and not isinstance(param, DTensor):
            raise ValueError(
                f"{self} is compressed, so its weight cannot become a {type(param).__name__}: quantize the dense "
                "model (peft_spp.decompress(model)), or leave this layer out"
            )
        super().register_parameter(name, param)

    def forward(self, x: Tensor) -> Tensor:
        return compressed_linear(x, self.compressed, self.bias)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *args: Any
    ) -> None:
        # The number of values is that of the weight that comes, and where rows begin is counted from its bitmask.
        values, bitmask = state_dict.get(f"{prefix}weight"), state_dict.get(f"{prefix}bitmask")
        if values is not None and bitmask is not None:
            shape = (self.out_features, self.in_features)
            row_offsets = check_compressed(values, bitmask, shape, f"{prefix}weight")
            assigned = local_metadata.get("assign_to_params_buffers", False)
            device = torch.device("meta") if assigned else self.weight.device
            places = torch.empty(len(values), dtype=self.weight.dtype, device=device)
            self.put(Compressed(places, self.bitmask, row_offsets.to(self.bitmask.device), self.in_features))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *args)

    def extra_repr(self) -> str:
        places = self.in_features * self.out_features
        return f"{super().extra_repr()}, zeros={1 - self.weight.numel() / places if places else 0:.1%}"


def put_dense_layers(module: nn.Module) -> None:
    """
    Replace all [`CompressedLinear`] of a module by dense layers, and make all [`CompressedExperts`] dense; or none if
    one of them has no data.
    """
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, CompressedLinear)}
    experts = {name: layer for name, layer in module.named_modules() if isinstance(layer, CompressedExperts)}
    weights = {name: [layer.compressed] for name, layer in layers.items()}
    weights |= {name: [layer.compressed(stack) for stack in layer.stacks] for name, layer in experts.items()}
    for name, own in weights.items():
        if any(weight.values.is_meta for weight in own):
            raise ValueError(
                f"{name} has no data in memory (it is offloaded): load the model without offloading, or decompress it "
                "on disk with `peft-spp decompress`"
            )
    for name, layer in layers.items():
        module.set_submodule(name, layer.to_linear())
    for module in experts.values():
        put_dense_stacks(module)
