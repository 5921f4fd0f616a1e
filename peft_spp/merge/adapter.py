# SPDX-License-Identifier: Apache-2.0
"""What a merge needs of a saved SPP adapter: its factors, and the trained tensors that replace the model's own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.utils.constants import CONFIG_NAME

from ..checkpoints.hub import local_folder
from ..checkpoints.names import is_adapter
from ..checkpoints.tensor_file import StoredTensor, open_tensor_file
from ..error_text import message
from ..functional import Factors
from ..sparsity.base_masks import BaseRecord
from ..tuner import SPPConfig
from ..tuner.adapter_files import PREFIX
from ..tuner.saved_adapter import SavedAdapter, read_adapter


INSTEAD = "Merge with PeftModel.from_pretrained(model, adapter).merge_and_unload() instead."
"""The way that is always open, for messages."""

# with bias="all" PEFT saves the biases of a module to save three times: as such, under this name, and unchanged
_SAVED_TWICE = re.compile(r"(.+)\.(modules_to_save|original_module)\.(\w+)")


@dataclass(frozen=True)
class AdaptedModule:
    """What an adapter holds for one module."""

    # the name of the module in the model that the adapter was trained on; of a parameter, what PEFT saves it by
    name: str
    A: StoredTensor  # the input factor, shape `(r, n)`
    B: StoredTensor  # the output factor, shape `(m, 1)`
    alpha: float  # the alpha of the scaling

    @property
    def r(self) -> int:
        """The number of row blocks."""
        return self.A.shape[0]

    @property
    def scaling(self) -> float:
        """s = alpha / r."""
        return self.alpha / self.r

    def load(self, weight_dtype: torch.dtype) -> Factors:
        """Read the factors, in the dtype that PEFT loads them in."""
        dtype = torch.float64 if weight_dtype == torch.float64 else torch.float32
        return Factors(self.A.load().to(dtype), self.B.load().to(dtype), self.scaling)


@dataclass(frozen=True)
class Adapter:
    """An SPP adapter in a local folder, as tools use it that have no model."""

    folder: Path
    config: SPPConfig  # its settings
    modules: dict[str, AdaptedModule]  # the adapted modules, by name
    # the tensors that take the place of the model's own, by their name there: biases and `modules_to_save`
    trained: dict[str, StoredTensor]
    # the base model's weights of adapted heads, which PEFT saves next to the factors, by their names there
    heads: dict[str, StoredTensor]
    base: BaseRecord | None  # the record of the base model that it was trained on
    saved: SavedAdapter  # the adapter that this was made of


def load_adapter(folder: Path) -> Adapter:
    """Read an adapter, and sort its tensors by what a merge does with them."""
    saved = read_adapter(folder)
    assert saved.folder is not None and saved.weights is not None
    config, file = saved.config, saved.folder / CONFIG_NAME
    if config.trainable_token_indices:
        raise ValueError(f"{file} has trainable_token_indices, which are not supported here. {INSTEAD}")
    stored = open_tensor_file(saved.weights).tensors
    trained: dict[str, StoredTensor] = {}
    heads: dict[str, StoredTensor] = {}
    for name, one in saved.others.items():
        twice = _SAVED_TWICE.fullmatch(name)
        if twice and f"{twice[1]}.{twice[3]}" in saved.others:
            continue
        if name == one.key or is_adapter(name, frozenset()) or "token_adapter" in name.split("."):
            raise ValueError(
                f"{saved.origin} contains tensor {one.key!r}, which is not part of a single SPP adapter. {INSTEAD}"
            )
        if (head := name.removesuffix(".base_layer.weight")) in saved.factors:
            heads[f"{head}.weight"] = stored[one.key]
            continue
        trained[re.sub(r"\.base_layer\.bias$", ".bias", name)] = stored[one.key]
    modules = {
        name: AdaptedModule(name, stored[found["A"].key], stored[found["B"].key], saved.alpha(name))
        for name, found in saved.factors.items()
    }
    for module in modules.values():
        if not module.A.name.startswith(PREFIX):
            raise ValueError(
                f"{saved.origin} contains tensor {module.A.name!r}, which is not part of a single SPP adapter. "
                f"{INSTEAD}"
            )
    return Adapter(saved.folder, config, modules, trained, heads, saved.base, saved)


def named_base(folder: Path, config: SPPConfig, **files: Sequence[str]) -> Path:
    """The base model that an adapter names: a path in it may have been written in another working folder."""
    file, name = folder / CONFIG_NAME, config.base_model_name_or_path
    if not name:
        raise ValueError(f"{file} does not name the base model. Pass it as base (--base on the command line).")
    try:
        return local_folder(name, revision=config.revision, **files)
    except OSError as error:
        raise FileNotFoundError(
            f"{file} names {name!r} as the base model, which was not found from {Path.cwd()}: {message(error)}. Pass "
            "the base model as base (--base on the command line)."
        ) from error
