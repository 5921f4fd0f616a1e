# SPDX-License-Identifier: Apache-2.0
"""Merging adapters into the weight of a layer, and taking them out again."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from ..architecture import what_computes
from ..functional import Compressed, merged_weight, scaled_weight
from .engines import is_dtensor, is_sharded, is_unsharded, is_zero3, whole_parameters
from .layer_factors import SPPLayer


# several threads may come to a merged layer whose adapters are disabled
_unmerging = threading.Lock()


class MergeableLayer(nn.Module, SPPLayer):
    """A layer whose adapters can be merged into its weight, which is stored transposed with `fan_in_fan_out`."""

    fan_in_fan_out: bool

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
        found = what_computes(self.get_base_layer(), self.parameter_name)
        if found is not None:
            what, remedy = found
            raise ValueError(
                f"Cannot merge into {self.module_name!r} or unmerge it: {what} computes its {self.parameter_name}, "
                f"and would overwrite the result. {remedy}"
            )

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
                f"FSDP2 has unsharded the weight of module {self.module_name!r}, and `reshard()` discards what is "
                "written to it. Call `reshard()` first: `merge_and_unload` merges into the shards."
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
                "`deepspeed.zero.GatheredParameters` or at FSDP2's `reshard()`. Pass `modifier_rank=0` to the "
                "former, or call `unmerge_adapter` before the latter. Call `unmerge_adapter` now to continue with "
                "the unmerged adapter."
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

    def recorded_weight(self) -> torch.Tensor | Compressed:
        """The unmerged weight, in the form that its mask is read from."""
        return self.unmerged_weight()

    def _merged_weight(self, adapter_names: Sequence[str]) -> torch.Tensor:
        weight = self.unmerged_weight()
        if weight.shape[-2:] != (self.out_features, self.in_features):
            raise RuntimeError(
                f"The weight of module {self.module_name!r} is not fully in memory: its shape is "
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
