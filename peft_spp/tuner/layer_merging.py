# SPDX-License-Identifier: Apache-2.0
"""Merging adapters into the weight of a layer, and taking them out again."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from ..architecture import what_computes
from ..functional import Compressed, scaled_weight
from ..functional.bitmask import transposed_mask
from .engines import is_dtensor, is_hooked, is_sharded, is_unsharded, is_zero3, whole_parameters
from .layer_factors import SPPLayer
from .weight_access import WeightAccess


# several threads may come to a merged layer whose adapters are disabled
_unmerging = threading.Lock()


class MergeableLayer(nn.Module, SPPLayer):
    """A layer whose adapters can be merged into its weight, in whichever form `backend` finds it there."""

    backend: WeightAccess

    @property
    def parameter_name(self) -> str:  # type: ignore[override]
        """What the base layer calls the weight."""
        return self.backend.parameter_name

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the weight is stored as (in_features, out_features)."""
        return self.backend.is_transposed

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
            delta = scaled_weight(self.unmerged_weight(), self.get_factors([adapter]), identity=False)
            return self.backend.stored(delta)

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
        base_layer = self.get_base_layer()
        with self._whole(write=True):
            merged = self._merged(new_adapters, safe_merge)
            if not self.backend.is_lossless:
                warnings.warn(
                    f"Merge spp module to a quantized linear ({self.backend.kind(base_layer)}) may get different "
                    "generations due to rounding errors.",
                    stacklevel=2,
                )
            if keep_unmerged and self._unmerged_weight is None:
                self._unmerged_weight = self.backend.copy(self.backend.packed(base_layer))
            if keep_unmerged and self.backend.is_lossless:
                self._keep_proof(self.backend.numbers(merged))
            self.backend.put(base_layer, merged)
        self.merged_adapters.extend(new_adapters)

    def _merged(self, new_adapters: list[str], safe_merge: bool) -> Any:
        """The weight to put, with the adapters that are merged already and others."""
        unmerged = self._unmerged()
        # a compressed weight has its whole shape in its bitmask
        weight = None if isinstance(unmerged, Compressed) else self.unmerged_weight()
        if weight is not None and weight.shape[-2:] != (self.out_features, self.in_features):
            raise RuntimeError(
                f"The weight of module {self.module_name!r} is not fully in memory: its shape is "
                f"{tuple(weight.shape)}, not {(self.out_features, self.in_features)}. With FSDP1 merge inside "
                "`FullyShardedDataParallel.summon_full_params(model)`, or save the adapter and merge it in a single "
                "process, for example with `peft-spp merge`."
            )
        factors = self.get_factors([*self.merged_adapters, *new_adapters])
        merged = self.backend.merged(self.get_base_layer(), unmerged, factors)
        if safe_merge:
            self._check_finite(self.backend.numbers(merged), new_adapters)
        return merged

    def _keep_proof(self, merged: torch.Tensor) -> None:
        """Keep a place that a merge changes in a weight that only the caller's gathering has made whole."""
        weight = self._base_weight()
        if is_zero3(weight) or is_unsharded(weight):
            changed = (weight != merged).reshape(-1)
            self._unproven_place = int(changed.int().argmax()) if changed.any() else None

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
            with self._whole(write=True):
                self.backend.put(self.get_base_layer(), self._unmerged_weight)
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
        weight = getattr(self.get_base_layer(), self.backend.parameter_name, None)
        if type(weight) is not nn.Parameter and type(weight) is not torch.Tensor and not is_dtensor(weight):
            self.convert()

    def check_writable(self) -> None:
        """
        Check that what a merge writes to the base layer's weight stays there.

        Raises:
            ValueError: If something computes the weight, as `torch.nn.utils.prune` and `parametrize` do, or it has no
                values.
        """
        if self._has_no_values(self.get_base_layer()) and not is_hooked(self.get_base_layer()):
            raise ValueError(
                f"Cannot merge into {self.module_name!r} or unmerge it: it is on the meta device, without values. "
                "Load the model's weights into memory first."
            )
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
        if self.backend.is_lossless and is_sharded(self._base_weight()):
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
        if self.backend.is_lossless and is_unsharded(self._base_weight()):
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
        before = self.backend.numbers(self._unmerged_weight).reshape(-1)[self._unproven_place]
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
        new_adapters = self._new_adapters(adapter_names)
        if new_adapters:
            with self._whole():
                self._merged(new_adapters, safe_merge=True)

    def _new_adapters(self, adapter_names: list[str] | None) -> list[str]:
        names = self.active_adapters if adapter_names is None else adapter_names
        return [name for name in names if name in self.spp_A and name not in self.merged_adapters]

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the base layer, merged if asked. Without an unmerge to come, no copy of the weight is kept."""
        if merge:
            self._merge(safe_merge, adapter_names, keep_unmerged=False)
        return self.get_base_layer()

    def _base_weight(self) -> torch.Tensor:
        weight: torch.Tensor = getattr(self.get_base_layer(), self.parameter_name)
        return weight

    def _whole(self, write: bool = False) -> AbstractContextManager[None]:
        # packages that quantize keep their weights whole
        return whole_parameters(self, write) if self.backend.is_lossless else nullcontext()

    def _unmerged(self) -> Any:
        """The weight as it was before any merge, in the form that the layer stores."""
        if self._unmerged_weight is not None:
            return self._unmerged_weight
        return self.backend.packed(self.get_base_layer())

    def unmerged_weight(self) -> torch.Tensor:
        """The base layer's weight as it was before any merge, shape (out_features, in_features)."""
        return self.backend.dequantize(self.get_base_layer(), self._unmerged())

    def recorded_weight(self) -> torch.Tensor | Compressed:
        """The unmerged weight, in the form that its mask is read from."""
        unmerged = self._unmerged()
        if not isinstance(unmerged, Compressed):
            return self.unmerged_weight()
        if not self.fan_in_fan_out:
            return unmerged
        # a stored zero counts as a zero, and only the values tell where it is
        has_zeros = unmerged.values.is_meta or not unmerged.values.all()
        return self.unmerged_weight() if has_zeros else transposed_mask(unmerged)

    def _check_finite(self, merged: torch.Tensor, adapter_names: Sequence[str]) -> None:
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
