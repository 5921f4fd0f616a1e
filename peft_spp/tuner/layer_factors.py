# SPDX-License-Identifier: Apache-2.0
"""The factors of the adapters in a layer, and the scalings that belong to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..functional import Factors
from .config import SPPConfig
from .engines import is_hooked
from .settings import check_rank


class SPPLayer(BaseTunerLayer):
    """
    What every SPP layer has: the factors of each adapter and the settings that belong to them.

    Args:
        base_layer (`nn.Module`): The layer to adapt.
        module_name (`str`): The name of the layer in the model, for messages.
    """

    # All names of layers that may contain (trainable) adapter weights
    adapter_layer_names: tuple[str, ...] = ("spp_A", "spp_B")
    # All names of other parameters that may contain adapter-related parameters
    other_param_names: tuple[str, ...] = ("r", "spp_alpha", "scaling", "spp_dropout")
    # what the base layer calls the weight, and how many weights of separate layers it is a stack of
    parameter_name: str = "weight"
    num_experts: int = 1
    # whether the code of the parent reads `weight`, and only to describe it; see `only_describes_weight`
    weight_is_only_described: bool = False
    # the threads in which a batch with several adapters is on its way through the model
    mixed_batch_threads: frozenset[int] = frozenset()

    def __init__(self, base_layer: nn.Module, module_name: str, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.module_name = module_name
        self.r: dict[str, int] = {}
        self.spp_alpha: dict[str, float] = {}
        # tensors where `prepare_model_for_compiled_hotswap` has been called
        self.scaling: dict[str, float | torch.Tensor] = {}
        self.spp_dropout = nn.ModuleDict()
        self.spp_A = nn.ModuleDict()
        self.spp_B = nn.ModuleDict()
        # Mark the weight as unmerged
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        # as the layer stores it, while an adapter is merged
        self._unmerged_weight: Any = None
        # a place that a merge changed in a weight that only the caller's gathering has made whole: it may not stay
        self._unproven_place: int | None = None
        # flag to enable/disable casting of input to weight dtype during forward call
        self.cast_input_dtype_enabled: bool = True
        self.kwargs = kwargs
        self._read_features()

    def _read_features(self) -> None:
        base_layer = self.get_base_layer()
        if isinstance(base_layer, Conv1D):
            # not from weight.shape, which an engine that shards parameters may have changed
            self.in_features, self.out_features = base_layer.nx, base_layer.nf
        else:
            self.in_features, self.out_features = base_layer.in_features, base_layer.out_features

    def update_layer(self, adapter_name: str, r: int, spp_alpha: float, config: SPPConfig, **kwargs: Any) -> None:
        """
        Add the factors of an adapter.

        Args:
            adapter_name (`str`): The name of the adapter.
            r (`int`): The number of row blocks. A layer with fewer output rows gets one block a row, as if that were
                the rank asked for it.
            spp_alpha (`float`): The update is scaled by `spp_alpha` over the layer's number of row blocks.
            config (`SPPConfig`): The configuration of the adapter.

        Raises:
            ValueError: If `r` is not a positive integer.
        """
        check_rank("r", r)
        r = min(r, self.out_features)
        self.r[adapter_name] = r
        self.spp_alpha[adapter_name] = spp_alpha
        self.scaling[adapter_name] = spp_alpha / r
        dropout = nn.Dropout(p=config.spp_dropout) if config.spp_dropout > 0.0 else nn.Identity()
        self.spp_dropout[adapter_name] = dropout
        # Linear modules for their weights alone: they are named `spp_A.<adapter>.weight` as LoRA's factors are, and
        # engines that shard or offload module by module find them
        self.spp_A[adapter_name] = nn.Linear(self.in_features, self.num_experts * r, bias=False)
        self.spp_B[adapter_name] = nn.Linear(1, self.num_experts * self.out_features, bias=False)
        self.reset_spp_parameters(adapter_name, config.init_weights)
        device, dtype = self._home()
        self._put_factors(adapter_name, device, dtype)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _home(self) -> tuple[torch.device | None, torch.dtype | None]:
        """The device and dtype of the base layer, as far as new factors can have them."""
        device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        return device, dtype if dtype is not None and dtype.is_floating_point else None

    def _put_factors(self, adapter_name: str, device: torch.device | None, dtype: torch.dtype | None) -> None:
        for factors in (self.spp_A, self.spp_B):
            factor = cast(nn.Linear, factors[adapter_name])
            # without memory the dtype is all that they can have
            factor.to(device=None if factor.weight.is_meta else device, dtype=dtype)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT calls this for factors that it has loaded with `low_cpu_mem_usage`. They keep their dtype: in the base
        # layer's they would be rounded, and `autocast_adapter_dtype` would bring nothing back.
        if adapter_name in self.spp_A:
            self._put_factors(adapter_name, device or self._home()[0], None)

    @torch.no_grad()
    def reset_spp_parameters(self, adapter_name: str, init_weights: bool | Literal["positive"]) -> None:
        """
        Draw the initial factors: A Kaiming-uniform with a = √5, that is U(-1/√n, 1/√n), B zero (SPP, section 3.2).

        Args:
            adapter_name (`str`): The name of the adapter.
            init_weights (`bool` or `"positive"`):
                Whether B is zero; otherwise it is drawn from U(-1, 1). `"positive"` takes the absolute values of A.
        """
        A, B = self._factors(adapter_name)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        if init_weights == "positive":
            A.abs_()
        if init_weights:
            nn.init.zeros_(B)
        else:
            nn.init.uniform_(B, -1.0, 1.0)

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self.merged_adapters:
            raise ValueError(
                f"Cannot delete adapter {adapter_name!r} while it is merged into {self.module_name or 'the layer'}. "
                "Please unmerge it first."
            )
        super().delete_adapter(adapter_name)

    def get_factors(self, adapter_names: Sequence[str]) -> list[Factors]:
        """
        The factors of those of `adapter_names` that this layer has.

        They come in the order of the alphabet, in which they are added up: so the sum has the same bits in the forward
        pass and in a merge, whichever order the adapters are named or merged in.
        """
        names = sorted(name for name in adapter_names if name in self.spp_A)
        factors = [Factors(*self._factors(name), self.scaling[name]) for name in names]
        for name, (A, B, _) in zip(names, factors, strict=True):
            # Multiplied with a tensor that has values, PyTorch gives what is in memory by chance.
            if (
                (A.is_meta or B.is_meta)
                and not self._has_no_values(self.get_base_layer())
                and not is_hooked(self.spp_A[name])  # it is offloaded
            ):
                raise ValueError(
                    f"Adapter {name!r} has no values in module {self.module_name!r}: it was added with "
                    "`low_cpu_mem_usage=True`, or to a layer that was offloaded, and its weights were not loaded. "
                    "Load them, or add it to a model in memory without `low_cpu_mem_usage`."
                )
        return factors

    @staticmethod
    def _has_no_values(module: nn.Module) -> bool:
        return any(parameter.is_meta for parameter in module.parameters(recurse=False))

    def _factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return cast(nn.Linear, self.spp_A[adapter_name]).weight, cast(nn.Linear, self.spp_B[adapter_name]).weight

    def set_scale(self, adapter: str, scale: float) -> None:
        """
        Set the scaling of an adapter to the one of its configuration, `spp_alpha / r`, times a factor.

        Args:
            adapter (`str`): The name of the adapter; a layer that does not have it is unchanged.
            scale (`float`): The factor.
        """
        if adapter in self.scaling:
            self.set_scaling(adapter, scale * self.spp_alpha[adapter] / self.r[adapter])

    def scale_layer(self, scale: float) -> None:
        """
        Multiply the current scaling of all active adapters by a factor.

        Args:
            scale (`float`): The factor.
        """
        for name in self.active_adapters:
            if name in self.scaling:
                self.set_scaling(name, float(self.scaling[name]) * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """
        Divide the current scaling of all active adapters by a factor.

        Args:
            scale (`float`, *optional*): The factor. With `None`, the scaling becomes that of the configuration.
        """
        for name in self.active_adapters:
            if scale is None:
                self.set_scale(name, 1.0)
            elif name in self.scaling:
                self.set_scaling(name, float(self.scaling[name]) / scale)

    def set_scaling(self, adapter: str, value: float) -> None:
        """
        Set the number that the update of an adapter is multiplied by.

        Args:
            adapter (`str`): The name of the adapter.
            value (`float`): The number; a scaling that is a tensor is overwritten in place.
        """
        scaling = self.scaling[adapter]
        if isinstance(scaling, torch.Tensor):
            scaling.fill_(value)
        else:
            self.scaling[adapter] = value

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        # PEFT's conversion factorizes an update that is added to the weight. SPP's update is a multiple of the weight
        # itself, place by place: it has full rank, and a low-rank stand-in would fill the pruned places.
        return False

    def _check_forward_args(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Check if the arguments are compatible with the configs and state of the model"""
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            return
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            # It is unclear what would be the right thing to do if users pass adapter_names and there are merged
            # adapters. Therefore, it is better to raise an error in this case.
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
