# SPDX-License-Identifier: Apache-2.0
"""A saved SPP adapter, read for merging: its settings, its factors, and the trained tensors beside them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import get_pattern_key

from ..checkpoints.tensor_file import StoredTensor, open_tensor_file
from ..functional import Factors
from ..sparsity.bits import FORMATS, look_at
from ..sparsity.file_bytes import read_bytes
from ..sparsity.names import is_adapter
from ..sparsity.safetensors_files import read_json
from ..tuner import SPPConfig
from ..tuner.adapter_file import FACTOR, check_belongs, check_factors


INSTEAD = "Merge with PeftModel.from_pretrained(model, adapter).merge_and_unload() instead."
"""The way that is always open, for messages."""

_PREFIX = "base_model.model."
# with bias="all" PEFT saves the biases of a module to save three times: as such, under this name, and as they were
_SAVED_TWICE = re.compile(r"(.+)\.(modules_to_save|original_module)\.(\w+)")
# adapters may hold embeddings, which are not read whole only to be checked
_CHECKED_BYTES = 1 << 24


@dataclass(frozen=True)
class AdaptedModule:
    """What an adapter holds for one module.

    Args:
        name (`str`): The name of the module in the model that the adapter was trained on.
        A (`StoredTensor`): The input factor, shape `(r, n)`.
        B (`StoredTensor`): The output factor, shape `(m, 1)`.
        alpha (`float`): The alpha of the scaling.
    """

    name: str
    A: StoredTensor
    B: StoredTensor
    alpha: float

    @property
    def r(self) -> int:
        """The number of row blocks."""
        return self.A.shape[0]

    @property
    def scaling(self) -> float:
        """s = alpha / r."""
        return self.alpha / self.r

    def load(self, weight_dtype: torch.dtype) -> Factors:
        """Read the factors, in the dtype that PEFT loads them in.

        Args:
            weight_dtype (`torch.dtype`): The dtype of the weight that they are merged into.

        Returns:
            `Factors`: A, B and the scaling.
        """
        dtype = torch.float64 if weight_dtype == torch.float64 else torch.float32
        return Factors(self.A.load().to(dtype), self.B.load().to(dtype), self.scaling)


@dataclass(frozen=True)
class Adapter:
    """An SPP adapter in a local folder.

    Args:
        folder (`Path`): The folder.
        config (`SPPConfig`): Its settings.
        modules (`dict[str, AdaptedModule]`): The adapted modules, by name.
        trained (`dict[str, StoredTensor]`):
            The tensors that take the place of the model's own, by their name there: biases and `modules_to_save`.
    """

    folder: Path
    config: SPPConfig
    modules: dict[str, AdaptedModule]
    trained: dict[str, StoredTensor]


def read_config(folder: Path) -> SPPConfig:
    """Read the settings of an adapter.

    Args:
        folder (`Path`): The folder of the adapter.

    Returns:
        `SPPConfig`: The settings.

    Raises:
        FileNotFoundError: If the folder holds none.
        ValueError: If they are those of another method, or cannot be used.
    """
    file = folder / CONFIG_NAME
    if not file.is_file():
        raise FileNotFoundError(f"{folder} is not a PEFT adapter: it holds no {CONFIG_NAME}")
    content = read_json(file, strict=True)
    if content.get("peft_type") != "SPP":
        raise ValueError(f"{file} is of peft_type {content.get('peft_type')!r}, and this works on SPP adapters alone")
    settings = SPPConfig.from_json_file(str(file))
    try:
        config = SPPConfig.from_peft_type(**settings)
    except ValueError as error:
        raise ValueError(f"{file} has settings that cannot be used: {error}") from error
    if config.target_parameters:
        raise ValueError(f"{file} has target_parameters, which are not merged here. {INSTEAD}")
    if config.trainable_token_indices:
        raise ValueError(f"{file} has trainable_token_indices, which are not read here. {INSTEAD}")
    return config


def read_adapter(folder: Path, config: SPPConfig) -> Adapter:
    """Read what an adapter holds, and check that all of it can be merged and is finite.

    Args:
        folder (`Path`): The folder of the adapter.
        config (`SPPConfig`): Its settings.

    Returns:
        `Adapter`: The adapter.

    Raises:
        FileNotFoundError: If it has no weights.
        ValueError: If a tensor is damaged, not finite, or of a kind that is not merged here.
    """
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        if (folder / WEIGHTS_NAME).is_file():
            raise ValueError(
                f"{folder / WEIGHTS_NAME} is pickled, which can run code when it is read, so it is not read. Load the "
                f"adapter with PEFT and save it again with save_pretrained, which writes {SAFETENSORS_WEIGHTS_NAME}."
            )
        raise FileNotFoundError(f"{folder} holds no {SAFETENSORS_WEIGHTS_NAME}")
    tensors = open_tensor_file(file).tensors
    check_belongs(file, config)
    factors: dict[str, dict[str, StoredTensor]] = {}
    trained: dict[str, StoredTensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        twice = _SAVED_TWICE.fullmatch(name)
        if twice and f"{_PREFIX}{twice[1]}.{twice[3]}" in tensors:
            continue
        if name != key and (match := FACTOR.fullmatch(name)):
            factors.setdefault(match[1], {})[match[2]] = tensor
        elif name == key or is_adapter(name, frozenset()) or "token_adapter" in name.split("."):
            raise ValueError(f"{file} holds tensor {key!r}, which is no part of a single SPP adapter. {INSTEAD}")
        else:
            trained[re.sub(r"\.base_layer\.bias$", ".bias", name)] = tensor
    check_factors(file, factors, config)
    modules = {name: _adapted_module(name, found["A"], found["B"], config) for name, found in factors.items()}
    if not modules and not trained:
        raise ValueError(f"{file} holds no tensors: there is nothing to merge")
    for tensor in tensors.values():
        _check_finite(tensor)
    return Adapter(folder, config, modules, trained)


def _adapted_module(name: str, A: StoredTensor, B: StoredTensor, config: SPPConfig) -> AdaptedModule:
    alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), name), config.spp_alpha)
    return AdaptedModule(name, A, B, alpha)


def _check_finite(tensor: StoredTensor) -> None:
    if not isinstance(tensor.dtype, torch.dtype):
        return
    for start, stop in _ranges(tensor):
        values = read_bytes(tensor.file, start, stop).view(tensor.dtype)
        finite = look_at(values).non_finite == 0 if values.dtype in FORMATS else values.float().isfinite().all()
        if not finite:
            raise ValueError(
                f"The adapter file {tensor.file} is broken: tensor {tensor.name!r} has values that are NaN or "
                "infinite. Nothing was written; use an earlier checkpoint of the adapter."
            )


def _ranges(tensor: StoredTensor) -> Iterator[tuple[int, int]]:
    for start in range(tensor.start, tensor.stop, _CHECKED_BYTES):
        yield start, min(start + _CHECKED_BYTES, tensor.stop)
