# SPDX-License-Identifier: Apache-2.0
"""A model of a checkpoint whose weights are on disk, and in memory only where and while they are needed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
import transformers
from accelerate.utils import set_module_tensor_to_device
from torch import nn
from transformers import PreTrainedModel

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.conversion import Origin, Origins
from ..checkpoints.empty_model import default_dtype, empty_model
from ..checkpoints.old_compressed_files import without_empty_formats
from .layers import PrunableLayer, find_blocks, find_target_layers, weight_name


_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

INSTEAD = (
    "Load the model with from_pretrained, prune it with prune_magnitude, prune_wanda or prune_sparsegpt, and save it "
    "with save_pretrained instead."
)


class Skeleton:
    """
    A model without data, and the checkpoint that has it.

    Args:
        checkpoint (`Checkpoint`): The checkpoint, with the `config.json` of a class of Transformers.
        device (`torch.device`): Where weights go when they are loaded, in the dtype that most of them are stored in.

    Raises:
        ValueError: If Transformers has no class for the model, or it is quantized.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.dtype = _main_dtype(checkpoint)
        self.model = _empty_model(checkpoint, self.dtype)
        # tied tensors under each of their names, since one may be in a block and another not
        self._state = dict(self.model.named_parameters(remove_duplicate=False)) | dict(
            self.model.named_buffers(remove_duplicate=False)
        )
        self._origins = Origins(self.model, checkpoint.tensors.values())
        self._targets: list[str] = []
        self._kept_in_float32 = _kept_in_float32(self.model, self.dtype)

    @cached_property
    def blocks_name(self) -> str:
        """The name of the list of the model's blocks; a `ValueError` if they cannot be run one by one."""
        return find_blocks(self.model, self._targets)[0]

    @cached_property
    def blocks(self) -> nn.ModuleList:
        """The model's blocks."""
        return find_blocks(self.model, self._targets)[1]

    def find_targets(
        self, target_modules: str | Iterable[str] | None, exclude_modules: str | Iterable[str] | None
    ) -> dict[str, PrunableLayer]:
        try:
            layers = find_target_layers(self.model, target_modules, exclude_modules)
        except ValueError as error:
            raise ValueError(f"{self.checkpoint.folder}, a {type(self.model).__name__}: {error}") from error
        self._targets = list(layers)
        for parameter, name in {weight_name(name, layer): name for name, layer in layers.items()}.items():
            self._check_stored(parameter, name)
        return layers

    def _check_stored(self, parameter: str, layer: str) -> None:
        shared = self.stored_name(parameter)
        if shared != parameter:
            raise ValueError(f"{layer} has the same weight as {shared}, which would be pruned twice. {INSTEAD}")
        for weight in self.origin(parameter).tensors:
            what = f"tensor {weight.name!r} of {weight.file} is {weight.describe()}"
            if weight.dtype not in _DTYPES:
                raise ValueError(f"{what}: prune before quantizing.")
            loaded = self._dtype_of(parameter)
            if weight.dtype != loaded == self.dtype:
                raise ValueError(f"{what}, but most others are {self.dtype}: save the model in one dtype first.")
            if weight.dtype != loaded:
                raise ValueError(
                    f"{what}, but Transformers loads it in {loaded}: exclude {layer} with exclude_modules. {INSTEAD}"
                )

    def origin(self, name: str) -> Origin:
        """Where the checkpoint has a tensor of the model."""
        return self._origins.whole(name, self.checkpoint.folder, INSTEAD)

    @contextmanager
    def loaded(self, names: Iterable[str]) -> Iterator[None]:
        """While active, tensors are in memory."""
        names = list(names)
        for name in names:
            self.load(name)
        try:
            yield
        finally:
            for name in names:
                self.drop(name)

    def load(self, name: str) -> None:
        """Load a tensor by its name in the model, or move it to the device if it is not part of the checkpoint."""
        if self._state[name].is_meta:
            stored = self.stored_name(name)
            value = self.origin(stored).load(self._dtype_of(name))[stored]
            set_module_tensor_to_device(
                self.model, name, self.device, value=value, dtype=self._dtype_of(name), clear_cache=False
            )
        else:
            set_module_tensor_to_device(self.model, name, self.device, clear_cache=False)

    def _dtype_of(self, name: str) -> torch.dtype:
        """The dtype that Transformers loads a tensor in."""
        if self._kept_in_float32.search(name):
            return torch.float32
        return self._state[name].dtype

    def drop(self, name: str) -> None:
        """Free the memory of a tensor that [`load`] can load again."""
        if self._state[name].is_meta:
            set_module_tensor_to_device(self.model, name, "meta", clear_cache=False)

    def is_stored(self, name: str) -> bool:
        """Whether a tensor is read from the checkpoint, and not computed, by its name in the model."""
        return self._state[name].is_meta

    def stored_name(self, name: str) -> str:
        """The name of a tensor that is in the checkpoint, which has one of those that are tied."""
        return name if name in self._origins else self.model.all_tied_weights_keys.get(name, name)

    def names_of_block(self, index: int) -> list[str]:
        """The tensors of the block numbered `index`, by their names in the model."""
        return [name for name in self._state if name.startswith(f"{self.blocks_name}.{index}.")]

    def names_of_stem(self) -> list[str]:
        """The tensors of all but the blocks and the head, by their names in the model."""
        stem = next(name for name, module in self.model.named_modules() if module is self.stem)
        prefix = f"{stem}." if stem else ""
        blocks = f"{self.blocks_name}."
        return [name for name in self._state if name.startswith(prefix) and not name.startswith(blocks)]

    @property
    def stem(self) -> nn.Module:
        """The model without its head."""
        stem: nn.Module = self.model.base_model
        return stem


def _main_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of most bytes."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in checkpoint.tensors.values():
        if isinstance(tensor.dtype, torch.dtype):
            sizes[tensor.dtype] += tensor.stop - tensor.start
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def _empty_model(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    if "model_type" not in checkpoint.config:
        raise ValueError(f"{checkpoint.folder} is not a model: it has no config.json with a model_type.")
    if checkpoint.compressed:
        raise ValueError(
            f"the model in {checkpoint.folder} is compressed: run `peft-spp decompress` on it before pruning."
        )
    if without_empty_formats(checkpoint.config).get("quantization_config") is not None:
        raise ValueError(f"the model in {checkpoint.folder} is quantized: prune before quantizing.")
    try:
        # others cannot be the default: of a quantized model, which is refused
        with default_dtype(dtype if dtype in _DTYPES else torch.get_default_dtype()):
            model = empty_model(checkpoint.folder, checkpoint.config)
    except (ValueError, KeyError) as error:
        if "auto_map" in checkpoint.config:
            raise ValueError(
                f"the model in {checkpoint.folder} needs its own code, which is not run here. Load it with "
                "trust_remote_code=True, and prune it in memory with prune_wanda, prune_sparsegpt or "
                "prune_magnitude."
            ) from error
        raise ValueError(
            f"Transformers {transformers.__version__} cannot build the model in {checkpoint.folder} (model_type "
            f"{checkpoint.config['model_type']!r}): {error}"
        ) from error
    model.requires_grad_(False)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not tensor.is_meta:  # made by `torch.Tensor(size)`, `torch.normal` or from numbers; it is read too
            set_module_tensor_to_device(model, name, "meta", clear_cache=False)
    _compute_buffers(model)
    return model


def _compute_buffers(model: PreTrainedModel) -> None:
    """
    Compute the buffers that are not part of a checkpoint, as from_pretrained does: in float32, whatever their dtype.

    The class makes them under the dtype of the model, which is too coarse for tables of positions.
    """
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name in module._non_persistent_buffers_set:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True  # from_pretrained marks what it has loaded, so that it is not drawn at random
    model.initialize_weights()


def _kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> re.Pattern[str]:
    """The tensors that Transformers loads in float32 whatever the dtype of the model."""
    plan = model._get_dtype_plan(dtype)
    return re.compile("|".join(f"(?:{name.replace('*', '.*')})" for name in plan) or "(?!)")
