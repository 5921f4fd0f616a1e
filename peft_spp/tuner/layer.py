# SPDX-License-Identifier: Apache-2.0
"""The forward pass of an adapted linear layer, and W' for those who read its weight."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .config import SPPConfig
from .engines import call_inside, is_hooked, is_sharded, own_forward
from .layer_factors import SPPLayer
from .layer_merging import MergeableLayer
from .weight_access import Plain, WeightAccess


class AdaptedLayer(MergeableLayer):
    """
    What is the same for every module with adapters, whatever it does with its weight.

    Args:
        base_layer (`nn.Module`): The module to adapt, or a tuner layer around one.
        adapter_name (`str`): The name of the first adapter.
        backend ([`WeightAccess`]): How to read and replace the weight.
        config (`SPPConfig`): The configuration of the adapter.
        r (`int`): The number of row blocks.
        spp_alpha (`float`): The alpha of the scaling.
        module_name (`str`): The name of the module in the model, for messages.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        backend: WeightAccess,
        config: SPPConfig,
        r: int,
        spp_alpha: float,
        module_name: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.backend = backend
        SPPLayer.__init__(self, base_layer, module_name=module_name, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, spp_alpha=spp_alpha, config=config)

    @property
    def weight(self) -> torch.Tensor:
        """
        W', for parents that compute with the weight of a layer instead of calling it.

        `nn.MultiheadAttention`, `nn.TransformerEncoderLayer` and Mamba's time step do. W' is computed whenever it is
        read, and is differentiable; where the adapters are merged or disabled it is the base layer's weight.
        `get_base_layer().weight` is always that.
        """
        self.follow_base_layer()
        if self.disable_adapters and self.merged:
            self._unmerge_once()
        names = [name for name in self.active_adapters if name in self.spp_A]
        if not names or self.disable_adapters or self.merged or not self._is_computed_with():
            weight: torch.Tensor = super().weight
            return weight
        if self.mixed_batch_threads and threading.get_ident() in self.mixed_batch_threads:
            raise RuntimeError(
                f"The parent of {self.module_name!r} reads its weight instead of calling it, so it does not support "
                "mixed adapter batches. Call the model once for each adapter."
            )
        if any(self._dropout_is_active(name) for name in names):
            warnings.warn(
                f"The parent of {self.module_name!r} reads its weight instead of calling it, so `spp_dropout` has no "
                "effect there.",
                stacklevel=2,
            )
        read = [module for name in names for module in (self.spp_A[name], self.spp_B[name])]
        if is_sharded(self._base_weight()) or self._base_weight().is_meta:
            read.append(self.get_base_layer())
        result: torch.Tensor = call_inside(
            [module for module in read if is_hooked(module)], partial(self._scaled, names)
        )
        return result

    def _is_computed_with(self) -> bool:
        """Whether the code that reads `weight` may compute with it."""
        return self.parameter_name == "weight" and not self.weight_is_only_described

    def _scaled(self, names: Sequence[str]) -> torch.Tensor:
        return self.backend.scaled(self.get_base_layer(), self.get_factors(names))

    def _dropout_is_active(self, adapter_name: str) -> bool:
        dropout = self.spp_dropout[adapter_name]
        return isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0.0

    def __repr__(self) -> str:
        rep = super().__repr__()
        return "spp." + rep


class Linear(AdaptedLayer):
    """
    SPP on a `torch.nn.Linear` or a `transformers.pytorch_utils.Conv1D`.

    Args:
        base_layer (`nn.Module`): The layer to adapt, or a tuner layer around one.
        adapter_name (`str`): The name of the first adapter.
        config (`SPPConfig`): Its configuration.
        r (`int`): The number of row blocks.
        spp_alpha (`float`): The alpha of the scaling.
        fan_in_fan_out (`bool`): Whether the weight is stored as (in_features, out_features).
        is_target_conv_1d_layer (`bool`): Whether the base layer is a `Conv1D`.
        module_name (`str`): The name of the layer in the model, for messages.
        backend ([`WeightAccess`], *optional*): How to read and replace the weight if it is not an ordinary parameter.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: SPPConfig,
        r: int,
        spp_alpha: float,
        fan_in_fan_out: bool = False,
        is_target_conv_1d_layer: bool = False,
        module_name: str = "",
        backend: WeightAccess | None = None,
        **kwargs: Any,
    ) -> None:
        backend = backend or Plain(is_transposed=fan_in_fan_out)
        super().__init__(base_layer, adapter_name, backend, config, r, spp_alpha, module_name, **kwargs)
        self.is_target_conv_1d_layer = is_target_conv_1d_layer

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.follow_base_layer()
        self._check_forward_args(x, **kwargs)
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            if self.merged:
                self._unmerge_once()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        if self.merged:
            self.prove_merge()
            return self.base_layer(x, *args, **kwargs)
        return self._adapted_forward(x, self.active_adapters, *args, **kwargs)

    def _adapted_forward(
        self, x: torch.Tensor, adapter_names: Sequence[str], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        names = [name for name in adapter_names if name in self.spp_A]
        base = self.get_base_layer()
        factors = [module for name in names for module in (self.spp_A[name], self.spp_B[name])]
        hooked = [module for module in (*factors, base) if is_hooked(module)]
        if not hooked:
            return self._adapted_linear(self.base_layer, names, x, *args, **kwargs)
        if base is self.base_layer:
            forward = own_forward(base)
        else:
            # a tuner layer in between calls the base layer itself, on other inputs perhaps
            base_result = self.base_layer(x, *args, **kwargs)
            forward = lambda *_, **__: base_result  # noqa: E731
        result: torch.Tensor = call_inside(hooked, partial(self._adapted_linear, forward, names), x, *args, **kwargs)
        return result

    def _adapted_linear(
        self,
        base_forward: Callable[..., torch.Tensor],
        names: Sequence[str],
        x: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        with_dropout = [name for name in names if self._dropout_is_active(name)]
        without_dropout = [name for name in names if name not in with_dropout]
        if without_dropout and not args and not kwargs and self._is_linear_map(base_forward):
            result = self._spp_linear(x, without_dropout, getattr(self.base_layer, "bias", None))
        else:
            result = base_forward(x, *args, **kwargs)
            if without_dropout:
                result = result + self._spp_linear(x, without_dropout, None, identity=False)
        # dropout acts on the input of the SPP branch alone, so the branch needs a separate matmul
        for name in with_dropout:
            result = result + self._spp_linear(self.spp_dropout[name](x), [name], None, identity=False)
        return result

    def _mixed_batch_forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str], **kwargs: Any
    ) -> torch.Tensor:
        # This is a special method that handles the case when users pass the argument `adapter_names`. This is an
        # extra argument that allows mixing different adapters in the same batch at inference time.
        result = self.base_layer(x, *args, **kwargs)
        for adapter in sorted(set(adapter_names) & set(self.spp_A)):
            indices = [index for index, name in enumerate(adapter_names) if name == adapter]
            result[indices] = self._adapted_forward(x[indices], [adapter], *args, **kwargs).to(result.dtype)
        return result

    def _spp_linear(
        self, x: torch.Tensor, adapter_names: Sequence[str], bias: torch.Tensor | None, identity: bool = True
    ) -> torch.Tensor:
        return self.backend.linear(self.get_base_layer(), x, bias, self.get_factors(adapter_names), identity)

    def _is_linear_map(self, forward: Callable[..., torch.Tensor]) -> bool:
        """Whether the forward pass is exactly a linear map, so that one matmul with W' can take its place."""
        # either the base layer itself, or its class's forward pass bound to it; asking for the base layer takes longer
        module = forward if isinstance(forward, nn.Module) else getattr(forward, "__self__", None)
        if not isinstance(module, nn.Module) or isinstance(module, BaseTunerLayer):
            return False
        is_its_own = module is forward or getattr(forward, "__func__", None) is type(module).forward
        return is_its_own and self.backend.forward_is_known(module)
