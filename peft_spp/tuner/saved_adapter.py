# SPDX-License-Identifier: Apache-2.0
"""Reading a saved adapter: one reader for everything that loads, merges, inspects, exports or swaps one."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import get_pattern_key

from ..checkpoints.instead import folders_inside, pass_one_of
from ..checkpoints.merged import adapter_id
from ..checkpoints.safetensors_files import read_json
from ..checkpoints.stored import Stored, count_non_finite
from ..sparsity.base_masks import BASE_MASKS, BaseRecord
from .adapter_files import (
    FACTOR,
    PREFIX,
    check_same_save,
    find_file,
    find_weights,
    list_loaded,
    list_tensors,
    read_record,
)
from .config import SPPConfig
from .settings import check_patterns, expressions


_FACTOR_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# adapters may hold embeddings, of which no second copy is made
_PIECE = 1 << 22


@dataclass(frozen=True)
class SavedAdapter:
    """
    A saved SPP adapter whose files have been read and checked.

    Args:
        origin (`str`): What to call it in messages: its weights' file.
        folder (`Path`, *optional*): The local folder it is in; `None` for a state dict.
        config (`SPPConfig`): Its settings.
        tensors (`Mapping[str, Stored]`):
            Its tensors by their names in the file, none of them read yet: `.shape`, `.dtype` and `.load()`.
        weights_id (`str`, *optional*): The id of the settings that the files were saved with.
        base (`BaseRecord`, *optional*): The record of the base model that it was trained on, if it has one.
    """

    origin: str
    folder: Path | None
    config: SPPConfig
    tensors: Mapping[str, Stored] = field(repr=False)
    weights_id: str | None = None
    base: BaseRecord | None = field(default=None, repr=False)

    @cached_property
    def factors(self) -> dict[str, dict[str, Stored]]:
        """The factors, `"A"` and `"B"`, by the name of their module in the base model."""
        return group_factors(self.tensors)

    @cached_property
    def others(self) -> dict[str, Stored]:
        """The tensors that are not factors (biases, `modules_to_save`, tokens), by name without PEFT's prefix."""
        names = {name.removeprefix(PREFIX): one for name, one in self.tensors.items()}
        return {name: one for name, one in names.items() if not FACTOR.fullmatch(name)}

    @property
    def identity(self) -> str:
        """What identifies the adapter by its factors, whatever folder it is in."""
        return adapter_id(
            (name, self.alpha(name) / one["A"].shape[0], one["A"].load(), one["B"].load())
            for name, one in self.factors.items()
        )

    @property
    def weights(self) -> Path | None:
        """The file of the weights."""
        files = (self.folder / name for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)) if self.folder else ()
        return next((file for file in files if file.is_file()), None)

    def alpha(self, module: str) -> float:
        """
        The alpha that the settings give a module.

        Args:
            module (`str`): The name of the module in the base model.
        """
        return alpha_of(self.config, module)


def alpha_of(config: SPPConfig, module: str) -> float:
    """The alpha that a configuration gives a module of the base model."""
    alpha: float = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), module), config.spp_alpha)
    return alpha


def group_factors(tensors: Mapping[str, Stored]) -> dict[str, dict[str, Stored]]:
    """The factors among the tensors of an adapter: `"A"` and `"B"`, as far as they are there, by module."""
    factors: dict[str, dict[str, Stored]] = {}
    for name, one in tensors.items():
        if match := FACTOR.fullmatch(name.removeprefix(PREFIX)):
            factors.setdefault(match[1], {})[match[2]] = one
    return factors


def read_settings(
    source: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    hub: Mapping[str, Any] | None = None,
    warn: bool = True,
) -> tuple[Path, SPPConfig]:
    """Read the settings of a saved adapter. It returns the file, and the settings."""
    file = find_file(source, CONFIG_NAME, subfolder, hub)
    if file is None:
        folder = Path(source, subfolder or "")
        inside = folders_inside(folder, [CONFIG_NAME]) if folder.is_dir() else []
        raise FileNotFoundError(f"{folder} is not a PEFT adapter: it has no {CONFIG_NAME}{pass_one_of(inside)}")
    method = read_json(file, strict=True).get("peft_type")
    if method != "SPP":
        raise ValueError(f"{file} has peft_type {method!r}, and only SPP adapters are supported here")
    try:
        settings = SPPConfig.from_json_file(str(file))
        known = inspect.signature(SPPConfig).parameters
        config = SPPConfig.from_peft_type(**{key: one for key, one in settings.items() if warn or key in known})
    except ValueError as error:
        if str(file) in str(error):
            raise
        raise ValueError(f"{file} has settings that are not valid: {error}") from error
    config.is_from_file = True
    return file, config


def read_adapter(
    source: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    pickled: bool = False,
    hub: Mapping[str, Any] | None = None,
    warn: bool = True,
) -> SavedAdapter:
    """
    Read a saved adapter, and check all of it that can be checked without a model.

    Args:
        source (`str` or `os.PathLike`): The local folder, or the id of a repository on the Hub.
        subfolder (`str`, *optional*): The folder inside of it.
        pickled (`bool`, *optional*, defaults to `False`):
            Whether pickled weights may be unpickled, and only weights; otherwise they are refused.
        hub (`Mapping[str, Any]`, *optional*): Arguments of `huggingface_hub.hf_hub_download`.
        warn (`bool`, *optional*, defaults to `True`): Whether to warn of unknown settings, as PEFT does.

    Returns:
        [`SavedAdapter`]: The adapter.

    Raises:
        FileNotFoundError: If it has no configuration or no weights.
        ValueError: If a file is damaged, is of another save than the others, or holds something else than a whole SPP
            adapter of these settings with finite values. The message names the file, and the tensor or the module.
    """
    config_file, config = read_settings(source, subfolder=subfolder, hub=hub, warn=warn)
    masks_file = find_file(source, BASE_MASKS, subfolder, hub)
    config.base_record, weights_id = read_record(config_file, masks_file)
    weights = find_weights(source, subfolder, hub)
    if weights is None:
        raise FileNotFoundError(f"{config_file.parent} has no {SAFETENSORS_WEIGHTS_NAME}")
    tensors, its_id = list_tensors(weights, pickled)
    check_same_save(weights, its_id, weights_id)
    saved = SavedAdapter(str(weights), weights.parent, config, tensors, weights_id, config.base_record)
    check_adapter(saved)
    return saved


def from_state_dict(config: SPPConfig, state_dict: Mapping[str, Any]) -> SavedAdapter:
    """Read an adapter that is in memory as it is saved, and check it as [`read_adapter`] does."""
    origin = "the state dict of the adapter"
    saved = SavedAdapter(origin, None, config, list_loaded(origin, state_dict), base=config.base_record)
    check_adapter(saved)
    return saved


def check_adapter(saved: SavedAdapter) -> None:
    """Check that an adapter is whole, fits its settings and has only finite values."""
    if not saved.tensors:
        raise ValueError(
            f"{saved.origin} contains no tensors. Save the adapter again, or load an earlier checkpoint of it."
        )
    twice = [name for name in saved.tensors if f"{PREFIX}{name}" in saved.tensors]
    if twice:
        raise ValueError(f"{saved.origin} contains tensor {twice[0]!r} twice, once with the prefix {PREFIX!r}")
    check_factors(saved.origin, saved.factors, saved.config)
    recorded = saved.base.masks if saved.base is not None and not saved.config.target_parameters else {}
    missing = [module for module in recorded if module not in saved.factors]
    if missing:
        raise ValueError(
            f"{saved.origin} is missing the factors of {len(missing)} of the {len(recorded)} modules that the "
            f"adapter was trained in, such as {missing[0]!r}. Copy it again, or load an earlier checkpoint."
        )
    for name, one in saved.tensors.items():
        check_finite(saved.origin, name, one)


class HasKind(Protocol):
    """Something that has the dtype of a tensor, or the file's name of one that is not floating, and its shape."""

    @property
    def dtype(self) -> torch.dtype | str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


def check_factors(origin: str, factors: Mapping[str, Mapping[str, HasKind]], config: SPPConfig) -> None:
    """
    Check that the factors have the shapes that the settings say, so that no more memory is taken than the file takes.
    """
    if config.is_from_file:
        patterns = expressions({"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern})
        check_patterns(patterns, factors)
    for module, found in factors.items():
        missing = {"A", "B"} - found.keys()
        if missing:
            raise ValueError(
                f"{origin} contains only half of the adapter of module {module!r}: spp_{missing.pop()} is missing. "
                "Load an earlier checkpoint of the adapter."
            )
        A, B = found["A"], found["B"]
        for factor, kind in found.items():
            if kind.dtype not in _FACTOR_DTYPES:
                name = str(kind.dtype).removeprefix("torch.")
                raise ValueError(
                    f"{origin}: tensor '{PREFIX}{module}.spp_{factor}.weight' has dtype {name}, which is not "
                    "supported. Save the adapter in float32, bfloat16 or float16."
                )
        if len(A.shape) != 2 or len(B.shape) != 2 or B.shape[1] != 1:
            raise ValueError(
                f"{origin}: the factors of module {module!r} have shapes A {A.shape} and B {B.shape}, not (r, in) and "
                "(out, 1). The file is damaged; copy it again."
            )
        if config.target_parameters and A.shape[0] <= B.shape[0]:
            continue  # perhaps of a stack of experts, whose number is the model's to tell
        r = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), module), config.r)
        if A.shape[0] != min(r, B.shape[0]):
            raise ValueError(
                f"{origin}: A of module {module!r} has {A.shape[0]} rows, but {min(r, B.shape[0])} in the adapter's "
                "settings: the weights and the settings do not belong together."
            )


def check_finite(origin: str, name: str, stored: Stored) -> None:
    """Raise a `ValueError` that names the file and the tensor if it has a value that is NaN or infinite."""
    if count_non_finite(stored.load()):
        raise ValueError(
            f"The adapter file {origin} is broken: tensor {name!r} contains NaN or infinite values. Load an earlier "
            "checkpoint of the adapter."
        )


def check_finite_as(origin: str, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise a `ValueError` if a value of a finite tensor is too large for the dtype of the model's parameter."""
    if any(not torch.isfinite(piece.to(dtype)).all() for piece in tensor.reshape(-1).split(_PIECE)):
        raise ValueError(
            f"{origin}: tensor {name!r} contains values that are too large for {dtype}, the dtype of the model's "
            "parameter. Load the model in a wider dtype, or an earlier checkpoint of the adapter."
        )
