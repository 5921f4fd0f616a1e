# SPDX-License-Identifier: Apache-2.0
"""How Transformers loads and saves models with compressed weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightTransform
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.quantizers.base import HfQuantizer

from ..architecture import find_expert_stacks
from ..checkpoints.compressed_files import bitmask_of
from ..checkpoints.old_compressed_files import Parts
from ..functional.bitmask import BITS, Compressed, check_compressed, count_stored
from ..functional.compressed import decompress
from .config import BitmaskConfig
from .expert_converters import ExpertConverters
from .expert_files import compress_experts, read_experts, save_as_dense
from .experts import CompressedExperts, put_row_offsets, put_stack_without_values
from .file_memory import compress_each
from .layer import CompressedLinear, put_dense_layers
from .old_formats import check_names, converters, find_old_weights, read_weight, save_in_our_format
from .operations import Compress, Read, ReadOld, one_of
from .saving import state_and_metadata
from .selection import (
    converted_names,
    find_compressible,
    module_name,
    warn_of_dense_layers,
    why_not_worth_it,
)


_SPLIT_SIZES = ("tp_size", "ep_size", "pp_size", "fsdp_size", "dp_replicate_size")
"""The sizes in Transformers' `DistributedConfig`; where all are 1, nothing is split."""


class BitmaskHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """
    Loads and saves compressed weights, through Transformers' own loader.

    The model is built dense, without data. A layer becomes a [`CompressedLinear`] when its weight comes: as values and
    bitmask from a compressed checkpoint, which so needs no list of its layers; or dense, and then it is compressed
    before the next one is read. Dense it is too when it comes in a format that compressed-tensors had. The module of a
    stack of experts becomes a [`CompressedExperts`] in the same way.

    Args:
        quantization_config ([`BitmaskConfig`]): The configuration, of which a copy is kept.
        pre_quantized (`bool`, *optional*, defaults to `True`): Whether the checkpoint is compressed.
    """

    requires_calibration = False
    quantization_config: BitmaskConfig
    serialized_names = {"weight": ["weight", "bitmask"]}  # noqa: RUF012  (Transformers declares it)

    def __init__(self, quantization_config: BitmaskConfig, **kwargs: Any) -> None:
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        # what to compress when it comes, and why other layers stay dense
        self._waiting: set[str] = set()
        self._places: dict[str, int] = {}
        self.stacks: tuple[str, ...] = ()
        self._kept: dict[str, str] = {}
        self._row_offsets: dict[str, Tensor] = {}
        self.problems: list[str] = []
        self.files: list[str] = []
        self._old: dict[str, Parts] = {}
        self.old_format: str | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if is_deepspeed_zero3_enabled():
            raise ValueError(
                "compressed weights cannot be split by DeepSpeed ZeRO-3, since each rank would have other places. Use "
                "ZeRO-2 or DDP, or load the model without BitmaskConfig (`peft-spp decompress`)."
            )
        devices = device_map if isinstance(device_map, Mapping) else {}
        away = next((name for name, device in devices.items() if str(device) in ("disk", "meta")), None)
        if away is not None:
            raise ValueError(
                f"compressed weights cannot be offloaded to disk, nor to the meta device: device_map has "
                f"'{devices[away]}' for {away!r}. Give the CPU more memory with max_memory, or load the model without "
                "BitmaskConfig (`peft-spp decompress`)."
            )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if self.pre_quantized and dtype not in BITS:
            raise ValueError(
                f"compressed weights are float32, bfloat16 or float16, and the model is to be loaded in {dtype}: pass "
                "dtype=torch.float32"
            )
        return dtype

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        # Asked before a weight is read, whether it is to be compressed; and after, whether it may have another shape
        # than the one that it had in the dense model.
        if param_name in self._waiting:
            return True
        module, _, name = param_name.rpartition(".")
        layer = model.get_submodule(module)
        if isinstance(layer, CompressedExperts):
            return any(name in (stack, bitmask_of(stack)) for stack in layer.stacks)
        return name in ("weight", "bitmask") and isinstance(layer, CompressedLinear)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        stored = param.get_dtype() if hasattr(param, "get_dtype") else str(param.dtype)
        return dtype if stored.startswith(("F", "BF", "torch.float", "torch.bfloat")) else None

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        parallel = getattr(model.config, "distributed_config", None)
        sizes = {name: getattr(parallel, name, None) or 1 for name in _SPLIT_SIZES}
        split = next((name for name, size in sizes.items() if size > 1), None)
        if split is not None:
            raise ValueError(
                f"compressed weights cannot be split between processes by Transformers: {split}={sizes[split]}. Leave "
                "out tp_plan and distributed_config (DDP, and FSDP2 of accelerate, take the whole model), or load the "
                "model without BitmaskConfig (`peft-spp decompress`)."
            )
        self.files = kwargs.get("checkpoint_files") or []
        if not self.pre_quantized:
            layers, stacks, self._kept = find_compressible(model, self.quantization_config.modules_to_not_convert)
            self.stacks = tuple(stacks)
            waiting = [*(f"{name}.weight" for name in layers), *stacks]
            self._waiting = set(waiting)
            self._places = {module_name(name): place for place, name in enumerate(waiting)}
            self._old = find_old_weights(self.files)
            if self.old_format is not None and not self.files:
                raise ValueError(
                    f"the model's configuration names the format {self.old_format!r} of compressed-tensors, which is "
                    "only read from files: load the folder, without state_dict"
                )
        else:
            self.stacks = tuple(find_expert_stacks(model))
        return model

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: PreTrainedModel
    ) -> list[WeightTransform]:
        experts = ExpertConverters(model, weight_conversions)
        apart = {name for name in self.stacks if not experts.can_compress(name, model.get_parameter(name).shape)}
        layers = converted_names(sorted(self._waiting.difference(self.stacks)), weight_conversions)
        for name in sorted(self._waiting & (apart | layers)):
            self._waiting.discard(name)
            self._kept[module_name(name)] = "stored in another form"
        check_names(self._old, model, weight_conversions)
        put_experts = read_experts if self.pre_quantized else compress_experts
        weight_conversions = put_experts(self, model, weight_conversions)
        updated: list[WeightTransform] = super().update_weight_conversions(weight_conversions, model)
        return [*updated, *converters(self._old, ReadOld(self))] if self._old else updated

    def get_quantize_ops(self) -> ConversionOps:
        return Compress(self)

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"deserialize": Read}

    def compress(self, model: nn.Module, name: str, dense: Tensor) -> dict[str, Tensor]:
        """
        Compress a weight that has been read, and put its layer in the model.

        Args:
            model (`nn.Module`): The model.
            name (`str`): The name of the weight.
            dense (`torch.Tensor`): The weight.

        Returns:
            `dict[str, torch.Tensor]`: The tensors of the layer, by name.
        """
        if name in self._waiting and dense.shape != model.get_parameter(name).shape:
            self._waiting.discard(name)
            return {name: dense}  # Transformers reports it, as for any model
        if not self.is_to_compress(model, name, [dense]):
            return {name: dense}
        (compressed,) = compress_each([dense], self.files)
        if name in self.stacks:
            return self.put_stack(model, name, compressed.values, compressed.bitmask, compressed.row_offsets)
        return self._put(model, module_name(name), compressed.values, compressed.bitmask, compressed.row_offsets)

    def is_to_compress(self, model: nn.Module, name: str, parts: Sequence[Tensor]) -> bool:
        """
        Whether a weight that has been read is to be compressed. It is answered once.

        Args:
            model (`nn.Module`): The model.
            name (`str`): The name of the weight.
            parts (`Sequence[torch.Tensor]`): The weight, or all that it is made of.

        Returns:
            `bool`: `False` if it is to stay dense.
        """
        if name not in self._waiting:
            return False
        self._waiting.discard(name)
        shape, dtype = model.get_parameter(name).shape, parts[0].dtype
        stored = sum(count_stored(one) for one in parts)
        reason = why_not_worth_it(stored, shape, dtype, self.quantization_config.min_sparsity)
        if reason is not None:
            self._kept[module_name(name)] = reason
        return reason is None

    def read(self, model: nn.Module, name: str, values: Tensor | None, bitmask: Tensor) -> dict[str, Tensor]:
        """
        Check a compressed weight that has been read, and put its layer in the model.

        Args:
            model (`nn.Module`): The model.
            name (`str`): The name of the weight.
            values (`torch.Tensor` or `None`): Its values, if there are any.
            bitmask (`torch.Tensor`): Its bitmask.

        Returns:
            `dict[str, torch.Tensor]`: The tensors of the layer, by name.
        """
        module = name.removesuffix(".weight")
        layer = model.get_submodule(module)
        try:
            if values is None:
                raise ValueError(f"{name}: the checkpoint has its bitmask and no values")
            if not isinstance(layer, nn.Linear):
                raise ValueError(f"{name}: only nn.Linear can be compressed, and {module} is a {type(layer).__name__}")
            outputs = len(bitmask) if bitmask.ndim == 2 and bitmask.numel() else layer.out_features
            row_offsets = check_compressed(values, bitmask, (outputs, layer.in_features), name)
        except ValueError as error:
            # Raised here it would become a line of Transformers' report. It is raised when all is read.
            self.problems.append(str(error))
            return {}
        if outputs != layer.out_features:  # as of a head with other labels: Transformers reports it, or ignores it
            return {name: decompress(Compressed(values, _aligned(bitmask), row_offsets, layer.in_features))}
        return self._put(model, module, values, bitmask, row_offsets)

    def put_stack(
        self, model: nn.Module, name: str, values: Tensor, bitmask: Tensor, row_offsets: Tensor
    ) -> dict[str, Tensor]:
        """
        Make room in the model for a compressed stack of experts that has been checked.

        Args:
            model (`nn.Module`): The model.
            name (`str`): The name of the parameter.
            values (`torch.Tensor`): Its values.
            bitmask (`torch.Tensor`): Its bitmask.
            row_offsets (`torch.Tensor`): Where its rows begin.

        Returns:
            `dict[str, torch.Tensor]`: The tensors of the stack, by name.
        """
        module, _, parameter = name.rpartition(".")
        put_stack_without_values(model.get_submodule(module), parameter)
        self._row_offsets[name] = row_offsets
        return {name: nn.Parameter(values, requires_grad=False), bitmask_of(name): _aligned(bitmask)}

    def read_old(self, model: PreTrainedModel, name: str, tensors: dict[str, Any]) -> dict[str, Tensor]:
        """
        Make a dense parameter of the tensors of an old format.

        Args:
            model (`PreTrainedModel`): The model.
            name (`str`): The name of the parameter.
            tensors (`dict[str, Any]`): What has come.

        Returns:
            `dict[str, torch.Tensor]`: The parameter, by name.
        """
        try:
            return {name: read_weight(model.get_parameter_or_buffer(name), name, tensors)}
        except ValueError as error:
            self.problems.append(str(error))
            return {}

    def read_alone(self, model: nn.Module, name: str, tensors: dict[str, Any]) -> dict[str, Any]:
        """
        Pass on a weight that has come without a bitmask.

        Args:
            model (`nn.Module`): The model.
            name (`str`): The name of the weight.
            tensors (`dict[str, Any]`): What has come.

        Returns:
            `dict[str, Any]`: The same, or nothing if a bitmask is missing.
        """
        is_weight = name.endswith(".weight") and isinstance(
            model.get_submodule(name.removesuffix(".weight")), nn.Linear
        )
        if is_weight and any(one_of(one).ndim == 1 for one in tensors.values()):
            self.problems.append(f"{name}: the checkpoint has its values and no bitmask")
            return {}
        return tensors

    def _put(
        self, model: nn.Module, module: str, values: Tensor, bitmask: Tensor, row_offsets: Tensor
    ) -> dict[str, Tensor]:
        layer = model.get_submodule(module)
        assert isinstance(layer, nn.Linear)
        model.set_submodule(module, CompressedLinear.without_values(layer))
        name = f"{module}.weight"
        self._row_offsets[name] = row_offsets
        return {name: nn.Parameter(values, requires_grad=False), bitmask_of(name): _aligned(bitmask)}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.problems:
            more = f" ({len(self.problems) - 1} more weights are wrong too)" if len(self.problems) > 1 else ""
            raise ValueError(
                f"{self.problems[0]}{more}. The checkpoint is damaged, or the model has other sizes: copy the "
                "checkpoint again, or load it with its own configuration."
            )
        for name, row_offsets in self._row_offsets.items():
            # Transformers leaves buffers that are not saved without a value
            put_row_offsets(model, name, row_offsets)
        self._row_offsets.clear()
        if self._old:
            save_in_our_format(model)
        transforms: Any = getattr(model, "_weight_conversions", None)
        save_as_dense(transforms or [])
        if not self.pre_quantized:
            # in the order of the model, and not of the files
            names = sorted(self._kept, key=lambda name: self._places.get(name, -1))
            warn_of_dense_layers({name: self._kept[name] for name in names})
            self.quantization_config.modules_to_not_convert = names
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        return state_and_metadata(model)

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        put_dense_layers(model)
        self.remove_quantization_config(model)
        return model if dtype is None else model.to(dtype=dtype)  # type: ignore[call-arg]

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _aligned(bitmask: Tensor) -> Tensor:
    # it may be a view of the file, and kernels read words of 8 bytes
    return bitmask.clone() if bitmask.data_ptr() % 8 else bitmask
