# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..functional import Factors, merged_weight, scaled_weight, spp_linear
from .computed_weights import check_writable
from .config import SPPConfig
from .inside_calls import call_inside, is_hooked, own_forward
from .settings import check_rank
from .whole_parameters import is_dtensor, is_sharded, is_unsharded, is_zero3, whole_parameters


# several threads may come to a merged layer whose adapters are disabled
_unmerging = threading.Lock()


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
        self._unmerged_weight: torch.Tensor | None = None
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
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

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
        return [Factors(*self._factors(name), self.scaling[name]) for name in names]

    def _factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return cast(nn.Linear, self.spp_A[adapter_name]).weight, cast(nn.Linear, self.spp_B[adapter_name]).weight

    def set_scale(self, adapter: str, scale: float) -> None:
        """
        Set the scaling of an adapter to the one of its configuration, `spp_alpha / r`, times a factor.

        Args:
            adapter (`str`): The name of the adapter; a layer that does not have it is left as it is.
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


class Linear(nn.Module, SPPLayer):
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
        **kwargs: Any,
    ) -> None:
        super().__init__()
        SPPLayer.__init__(self, base_layer, module_name=module_name, **kwargs)
        self.fan_in_fan_out = fan_in_fan_out
        self.is_target_conv_1d_layer = is_target_conv_1d_layer
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
                f"The module that holds {self.module_name!r} reads its weight and does not call it, so that a batch "
                "with several adapters cannot pass through it. Call the model once for each adapter."
            )
        if any(self._dropout_is_active(name) for name in names):
            warnings.warn(
                f"The module that holds {self.module_name!r} reads its weight and does not call it: `spp_dropout` has "
                "no effect there.",
                stacklevel=2,
            )
        read = [module for name in names for module in (self.spp_A[name], self.spp_B[name])]
        if is_sharded(self._base_weight()) or self._base_weight().is_meta:
            read.append(self.get_base_layer())
        result: torch.Tensor = call_inside(
            [module for module in read if is_hooked(module)], partial(self._effective_weight, names)
        )
        return result

    def _is_computed_with(self) -> bool:
        """Whether the one who reads `weight` may compute with it."""
        return self.parameter_name == "weight" and not self.weight_is_only_described

    def _effective_weight(self, names: Sequence[str]) -> torch.Tensor:
        return self._transpose(scaled_weight(self._transpose(self._base_weight()), self.get_factors(names)))

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """
        What the adapter adds to the weight: `s · P(A) ⊙ B ⊙ W`, computed from the weight without any merged adapter.

        Args:
            adapter (`str`): The name of the adapter.

        Returns:
            `torch.Tensor`: In the shape and dtype of the base layer's weight.
        """
        self.follow_base_layer()
        with whole_parameters(self):
            return self._transpose(scaled_weight(self.unmerged_weight(), self.get_factors([adapter]), identity=False))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Merge the active adapter weights into the base weights

        The merged weight is computed from the weight as it was before any merge and from all merged adapters together,
        so that one merge after another gives the same bits as one merge of all. The unmerged weight is kept, in host
        memory, for [`unmerge`].

        Args:
            safe_merge (`bool`, *optional*):
                If True, the merge operation will be performed in a copy of the original weights and check for NaNs
                before merging the weights. This is useful if you want to check if the merge operation will produce
                NaNs. Defaults to `False`.
            adapter_names (`list[str]`, *optional*):
                The list of adapter names that should be merged. If None, all active adapters will be merged. Defaults
                to `None`.

        Raises:
            ValueError: If `safe_merge` is set and the merged weight would not be finite; nothing is changed then.
        """
        self.follow_base_layer()
        self._merge(safe_merge, adapter_names, keep_unmerged=True)

    def _merge(self, safe_merge: bool, adapter_names: list[str] | None, keep_unmerged: bool) -> None:
        new_adapters = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.spp_A]
        if not new_adapters:
            # no adapter to merge
            return
        self.check_writable()
        if keep_unmerged:
            self.check_merge_stays()
        with whole_parameters(self, write=True):
            merged = self._merged_weight([*self.merged_adapters, *new_adapters])
            if safe_merge:
                self._check_merged_weight(merged, new_adapters)
            weight = self._base_weight()
            if keep_unmerged and self._unmerged_weight is None:
                self._unmerged_weight = weight.detach().to("cpu", copy=True)
            if keep_unmerged and (is_zero3(weight) or is_unsharded(weight)):
                changed = (weight != self._transpose(merged)).reshape(-1)
                self._unproven_place = int(changed.int().argmax()) if changed.any() else None
            weight.data.copy_(self._transpose(merged))
        self.merged_adapters.extend(new_adapters)

    def unmerge(self) -> None:
        """
        This method unmerges all merged adapter layers from the base weights, restoring them bit for bit.
        """
        if self._unmerged_weight is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.follow_base_layer()
        self.check_writable()
        if not self._is_merge_lost():
            with whole_parameters(self, write=True):
                self._base_weight().data.copy_(self._unmerged_weight)
        self._unmerged_weight = None
        self._unproven_place = None
        self.merged_adapters.clear()

    convert: ClassVar[Callable[[Any], None]]
    """Set by `quantized.conversion`, whose layers derive from this one."""

    def follow_base_layer(self) -> None:
        """
        Adapt the base layer as it is now, if its weight has been quantized since the adapter was added.

        Raises:
            ValueError: If it has become something that cannot be adapted.
        """
        weight = getattr(self.get_base_layer(), self.parameter_name, None)
        if type(weight) is not nn.Parameter and type(weight) is not torch.Tensor and not is_dtensor(weight):
            self.convert()

    def check_writable(self) -> None:
        """
        Check that what a merge writes to the base layer's weight stays there.

        Raises:
            ValueError: If something computes the weight, as `torch.nn.utils.prune` and `parametrize` do.
        """
        check_writable(self.get_base_layer(), self.parameter_name, self.module_name)

    def _unmerge_once(self) -> None:
        with _unmerging:
            if self.merged:
                self.unmerge()

    def check_merge_stays(self) -> None:
        """
        Raise an error if the weight cannot be written to such that a later unmerge finds it.

        Raises:
            RuntimeError: If the weight is sharded.
        """
        if is_sharded(self._base_weight()):
            # disabling the adapters inside a forward pass would unmerge the gathered weight, and leave the shards
            raise RuntimeError(
                f"The weight of module {self.module_name!r} is sharded. Merge it with `merge_and_unload`; or, with "
                "DeepSpeed ZeRO-3, merge and unmerge inside `deepspeed.zero.GatheredParameters(model.parameters())`; "
                "or save the adapter and merge it in a single process, for example with `peft-spp merge`."
            )

    def check_unload_stays(self) -> None:
        """
        Raise an error if a merge into the weight would be discarded later, or one before has been.

        Raises:
            RuntimeError: If FSDP2 has unsharded the weight, or sharded it again since it was merged.
        """
        self.prove_merge()
        if is_unsharded(self._base_weight()):
            raise RuntimeError(
                f"FSDP2 has unsharded the weight of module {self.module_name!r}, and discards what is written to it "
                "at `reshard()`. Call `reshard()` first: `merge_and_unload` merges into the shards."
            )

    def prove_merge(self) -> None:
        """
        Raise an error if a merge was lost when the weight was sharded again.

        Raises:
            RuntimeError: If it was.
        """
        if self._unproven_place is None:
            return
        if self._is_merge_lost():
            raise RuntimeError(
                f"The merge into module {self.module_name!r} was lost at the end of "
                "`deepspeed.zero.GatheredParameters` or at FSDP2's `reshard()`. Pass the former `modifier_rank=0`, or "
                "call `unmerge_adapter` before. Call `unmerge_adapter` now to go on with the unmerged adapter."
            )
        if is_zero3(self._base_weight()) and is_sharded(self._base_weight()):
            self._unproven_place = None

    def _is_merge_lost(self) -> bool:
        if self._unproven_place is None:
            return False
        with whole_parameters(self):
            now = self._base_weight().detach().reshape(-1)[self._unproven_place]
        before = cast(torch.Tensor, self._unmerged_weight).reshape(-1)[self._unproven_place]
        # the weight may have been gathered in a lower precision
        return bool(now.to(before) == before)

    def check_merge(self, adapter_names: list[str] | None = None) -> None:
        """
        Raise the error of a safe merge without merging.

        Args:
            adapter_names (`list[str]`, *optional*): The adapters to merge, by default the active ones.

        Raises:
            ValueError: If the merged weight would not be finite.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        new_adapters = [name for name in names if name in self.spp_A and name not in self.merged_adapters]
        if new_adapters:
            with whole_parameters(self):
                self._check_merged_weight(self._merged_weight([*self.merged_adapters, *new_adapters]), new_adapters)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the base layer, merged if asked. Without an unmerge to come, no copy of the weight is kept."""
        if merge:
            self._merge(safe_merge, adapter_names, keep_unmerged=False)
        return self.get_base_layer()

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
        # dropout acts on the input of the SPP branch alone, so the branch needs a matmul of its own
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
        return spp_linear(
            x,
            self._base_weight(),
            bias,
            self.get_factors(adapter_names),
            fan_in_fan_out=self.fan_in_fan_out,
            identity=identity,
        )

    def _is_linear_map(self, forward: Callable[..., torch.Tensor]) -> bool:
        """Whether the forward pass is exactly a linear map, so that one matmul with W' can take its place."""
        function = type(forward).forward if isinstance(forward, nn.Module) else getattr(forward, "__func__", None)
        return function in (nn.Linear.forward, Conv1D.forward)

    def _dropout_is_active(self, adapter_name: str) -> bool:
        dropout = self.spp_dropout[adapter_name]
        return isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0.0

    def _transpose(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.t() if self.fan_in_fan_out else weight

    def _base_weight(self) -> torch.Tensor:
        weight: torch.Tensor = getattr(self.get_base_layer(), self.parameter_name)
        return weight

    def unmerged_weight(self) -> torch.Tensor:
        """The base layer's weight as it was before any merge, shape (out_features, in_features)."""
        weight = self._base_weight().detach()
        if self._unmerged_weight is not None:
            weight = self._unmerged_weight.to(weight.device, weight.dtype)
        return self._transpose(weight)

    def _merged_weight(self, adapter_names: Sequence[str]) -> torch.Tensor:
        weight = self.unmerged_weight()
        if weight.shape[-2:] != (self.out_features, self.in_features):
            raise RuntimeError(
                f"The weight of module {self.module_name!r} is not in memory as a whole: its shape is "
                f"{tuple(weight.shape)}, not {(self.out_features, self.in_features)}. With FSDP1 merge inside "
                "`FullyShardedDataParallel.summon_full_params(model)`, or save the adapter and merge it in a single "
                "process, for example with `peft-spp merge`."
            )
        return merged_weight(weight, self.get_factors(adapter_names))

    def _check_merged_weight(self, merged: torch.Tensor, adapter_names: Sequence[str]) -> None:
        if torch.isfinite(merged).all():
            return
        broken = [
            name for name in adapter_names if not all(torch.isfinite(factor).all() for factor in self._factors(name))
        ]
        raise ValueError(
            "NaNs detected in the merged weights. The adapter "
            f"{','.join(broken or adapter_names)} seems to be broken (module {self.module_name!r}). Nothing was "
            "merged; delete the adapter or load an earlier checkpoint of it."
        )

    def __repr__(self) -> str:
        rep = super().__repr__()
        return "spp." + rep
