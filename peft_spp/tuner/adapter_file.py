# SPDX-License-Identifier: Apache-2.0
"""Checks of a saved adapter before a model is changed for it."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from ..sparsity.safetensors_files import DTYPES, checked_shape
from .patterns import check_patterns
from .saved_modules import SavedNames
from .saving import WEIGHTS_ID
from .settings import expressions


if TYPE_CHECKING:
    from .config import SPPConfig


FACTOR = re.compile(r"(.+)\.spp_([AB])\.weight")
"""The names of the factors in an adapter's weights."""

_PREFIX = "base_model.model."
_FACTOR_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class HasKind(Protocol):
    """Something that has the dtype of a tensor, or the file's name of one that is not floating, and its shape."""

    @property
    def dtype(self) -> torch.dtype | str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class _Kind(NamedTuple):
    dtype: torch.dtype | str
    shape: tuple[int, ...]


def find_weights(
    folder: str | os.PathLike[str], subfolder: str | None, hub_arguments: Mapping[str, Any]
) -> Path | None:
    """
    Find the file that PEFT will load the weights of an adapter from; from the Hub it is downloaded.

    Args:
        folder (`str` or `os.PathLike`): The local folder, or the id of a repository on the Hub.
        subfolder (`str`, *optional*): The folder inside of it.
        hub_arguments (`Mapping[str, Any]`): Arguments of `huggingface_hub.hf_hub_download`.

    Returns:
        `Path` or `None`: The file, safetensors if there is one, else pickled; `None` if there are no weights.
    """
    local = Path(folder, subfolder or "")
    if (local / CONFIG_NAME).is_file():
        names = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
        return next((local / name for name in names if (local / name).exists()), None)
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        try:
            return Path(hf_hub_download(os.fspath(folder), name, subfolder=subfolder, **hub_arguments))
        except EntryNotFoundError:
            continue
    return None


def check_weights(file: Path, config: SPPConfig, weights_only: bool | None = None) -> SavedNames:
    """
    Check that the weights of an adapter can be read, fit its settings and are finite.

    Args:
        file (`Path`): The weights.
        config (`SPPConfig`): The settings.
        weights_only (`bool`, *optional*):
            `True` to take pickled weights, of which nothing but weights is unpickled; otherwise they are refused.

    Returns:
        [`SavedNames`]: What is in the file.

    Raises:
        ValueError: If something is wrong with them; the message names the file and the tensor.
    """
    if file.name != SAFETENSORS_WEIGHTS_NAME:
        if weights_only is not True:
            raise ValueError(
                f"{file} is pickled, which can run code when it is read, so it is not read. Ask for the adapter in "
                "safetensors, or pass `weights_only=True`, which unpickles nothing but weights."
            )
        return SavedNames(file, _check_pickled(file, config))
    try:
        check_belongs(file, config)
        with safe_open(file, framework="pt") as tensors:
            kinds = {}
            for name in tensors.keys():
                view = tensors.get_slice(name)
                dtype = view.get_dtype()
                kinds[name] = _Kind(DTYPES.get(dtype, dtype), checked_shape(file, name, view.get_shape()))
            check_factors(file, _factors(kinds), config)
            for name in kinds:
                _check_finite(file, name, tensors.get_tensor(name))
        return SavedNames(file, frozenset(kinds))
    except SafetensorError as error:
        raise ValueError(
            f"The adapter file {file} cannot be read ({error}). It may have been cut short; copy it again."
        ) from error


def check_factors(file: Path, factors: Mapping[str, Mapping[str, HasKind]], config: SPPConfig) -> None:
    """
    Check that the factors have the shapes that the settings say, so that no more memory is taken than the file takes.

    Args:
        file (`Path`): The file, for messages.
        factors (`Mapping[str, Mapping[str, HasKind]]`): Under the name of each module, its `"A"` and `"B"`.
        config (`SPPConfig`): The settings.

    Raises:
        ValueError: If a factor is missing, is not of a floating dtype, or is of another shape, or if a pattern of the
            settings would take too long to match.
    """
    patterns = expressions({"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern})
    check_patterns(patterns, factors)
    for module, found in factors.items():
        missing = {"A", "B"} - found.keys()
        if missing:
            raise ValueError(
                f"{file} holds only half of the adapter of module {module!r}: spp_{missing.pop()} is missing. Load an "
                "earlier checkpoint of the adapter."
            )
        A, B = found["A"], found["B"]
        for factor, kind in found.items():
            if kind.dtype not in _FACTOR_DTYPES:
                name = str(kind.dtype).removeprefix("torch.")
                raise ValueError(
                    f"{file}: tensor '{_PREFIX}{module}.spp_{factor}.weight' has dtype {name}, which is not floating, "
                    "or too short. Save the adapter in float32, bfloat16 or float16."
                )
        if len(A.shape) != 2 or len(B.shape) != 2 or B.shape[1] != 1:
            raise ValueError(
                f"{file}: the factors of module {module!r} have shapes A {A.shape} and B {B.shape}, not (r, in) and "
                "(out, 1). The file is damaged; copy it again."
            )
        if config.target_parameters and A.shape[0] <= B.shape[0]:
            continue  # perhaps of a stack of experts, whose number is the model's to tell
        r = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), module), config.r)
        if A.shape[0] != min(r, B.shape[0]):
            raise ValueError(
                f"{file}: A of module {module!r} has {A.shape[0]} rows, and the settings of the adapter say "
                f"{min(r, B.shape[0])}: they do not belong together."
            )


def _factors(kinds: Mapping[str, _Kind]) -> dict[str, dict[str, _Kind]]:
    factors: dict[str, dict[str, _Kind]] = {}
    for name, kind in kinds.items():
        if match := FACTOR.fullmatch(name.removeprefix(_PREFIX)):
            factors.setdefault(match[1], {})[match[2]] = kind
    return factors


def check_belongs(file: Path, config: SPPConfig) -> None:
    """
    Check that weights were saved with the settings beside them: a save that was cut off may have left older ones.

    Args:
        file (`Path`): The weights, in safetensors.
        config (`SPPConfig`): The settings.

    Raises:
        ValueError: If both tell which settings they were saved with, and they are not the same.
    """
    with safe_open(file, framework="pt") as tensors:
        weights_id = (tensors.metadata() or {}).get(WEIGHTS_ID)
    if None not in (weights_id, config.saved_weights_id) and weights_id != config.saved_weights_id:
        raise ValueError(
            f"{file} was saved with other settings than those in the {CONFIG_NAME} beside it: a save was interrupted, "
            "or one of the two was copied from elsewhere. Save the adapter again, or load an earlier checkpoint."
        )


def _check_finite(file: Path, name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype == getattr(torch, "float4_e2m1fn_x2", None):
        return  # it has no such values
    if tensor.is_floating_point() and tensor.element_size() == 1:
        tensor = tensor.float()  # PyTorch does not test float8
    if (tensor.is_floating_point() or tensor.is_complex()) and not torch.isfinite(tensor).all():
        raise ValueError(
            f"The adapter file {file} is broken: tensor {name!r} has values that are NaN or infinite. "
            "Load an earlier checkpoint of the adapter."
        )


def _check_pickled(file: Path, config: SPPConfig) -> frozenset[str]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(
            f"The adapter file {file} cannot be read ({error}), at least not without running code that is in it, "
            "which is never done. Ask for the adapter in safetensors."
        ) from error
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()
    ):
        raise ValueError(f"The adapter file {file} holds something else than tensors by name.")
    kinds = {name: _Kind(tensor.dtype, tuple(tensor.shape)) for name, tensor in content.items()}
    check_factors(file, _factors(kinds), config)
    for name, tensor in content.items():
        _check_finite(file, name, tensor)
    return frozenset(content)
