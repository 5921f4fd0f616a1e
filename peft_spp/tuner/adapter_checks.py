# SPDX-License-Identifier: Apache-2.0
"""Checks of the tensors of a saved adapter, before a model is changed for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from peft.utils.other import get_pattern_key

from ..sparsity.weights import Stored
from .adapter_files import PREFIX
from .patterns import check_patterns
from .settings import expressions


if TYPE_CHECKING:
    from .config import SPPConfig


_FACTOR_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# adapters may hold embeddings, of which no second copy is made
_PIECE = 1 << 22


class HasKind(Protocol):
    """Something that has the dtype of a tensor, or the file's name of one that is not floating, and its shape."""

    @property
    def dtype(self) -> torch.dtype | str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


def check_factors(origin: str, factors: Mapping[str, Mapping[str, HasKind]], config: SPPConfig) -> None:
    """
    Check that the factors have the shapes that the settings say, so that no more memory is taken than the file takes.

    Args:
        origin (`str`): The file, for messages.
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
                f"{origin} holds only half of the adapter of module {module!r}: spp_{missing.pop()} is missing. "
                "Load an earlier checkpoint of the adapter."
            )
        A, B = found["A"], found["B"]
        for factor, kind in found.items():
            if kind.dtype not in _FACTOR_DTYPES:
                name = str(kind.dtype).removeprefix("torch.")
                raise ValueError(
                    f"{origin}: tensor '{PREFIX}{module}.spp_{factor}.weight' has dtype {name}, which is not "
                    "floating, or too short. Save the adapter in float32, bfloat16 or float16."
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
                f"{origin}: A of module {module!r} has {A.shape[0]} rows, and the settings of the adapter say "
                f"{min(r, B.shape[0])}: they do not belong together."
            )


def check_finite(origin: str, name: str, stored: Stored) -> None:
    """
    Check that a tensor of an adapter has only finite values.

    Args:
        origin (`str`): The file, for messages.
        name (`str`): The name of the tensor in it.
        stored (`Stored`): The tensor.

    Raises:
        ValueError: If a value is NaN or infinite.
    """
    if not isinstance(stored.dtype, torch.dtype) and not stored.dtype.startswith("C"):
        return  # integers, and formats that have no such values
    tensor = stored.load()
    values = tensor.reshape(-1)
    for start in range(0, values.numel(), _PIECE):
        piece = values[start : start + _PIECE]
        if piece.is_floating_point() and piece.element_size() == 1:
            piece = piece.float()  # PyTorch does not test float8
        if (piece.is_floating_point() or piece.is_complex()) and not torch.isfinite(piece).all():
            raise ValueError(
                f"The adapter file {origin} is broken: tensor {name!r} has values that are NaN or infinite. "
                "Load an earlier checkpoint of the adapter."
            )


def check_finite_as(origin: str, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """
    Check that a tensor of an adapter still has only finite values in the dtype of the model's parameter.

    Args:
        origin (`str`): The file, for messages.
        name (`str`): The name of the tensor.
        tensor (`torch.Tensor`): The tensor, whose values are finite.
        dtype (`torch.dtype`): The dtype of the parameter.

    Raises:
        ValueError: If a value is too large for it.
    """
    if any(not torch.isfinite(piece.to(dtype)).all() for piece in tensor.reshape(-1).split(_PIECE)):
        raise ValueError(
            f"{origin}: tensor {name!r} has values that are too large for {dtype}, the dtype of the model's "
            "parameter. Load the model in a wider dtype, or an earlier checkpoint of the adapter."
        )
