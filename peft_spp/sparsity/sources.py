# SPDX-License-Identifier: Apache-2.0
"""Opening any kind of source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from torch import Tensor, nn

from .safetensors_files import stored_in_files
from .selection import select
from .tensors import stored_in_mapping, stored_in_module
from .weights import Weights


Source = nn.Module | Mapping[str, Tensor] | str | PathLike[str]
"""What can be read: a model, a state dict, or a path to a safetensors file or folder."""


def open_weights(
    source: Source,
    *,
    modules: str | Sequence[str] | None = None,
    conv1d: bool | str | Sequence[str] | None = None,
) -> Weights:
    """List the weights of any kind of source; none is read yet.

    Args:
        source (`nn.Module`, `Mapping[str, torch.Tensor]`, `str` or `PathLike`): See [`sparsity_report`].
        modules (`str` or `Sequence[str]`, *optional*): See [`sparsity_report`].
        conv1d (`bool`, `str` or `Sequence[str]`, *optional*): See [`sparsity_report`].

    Returns:
        `Weights`: The weights.

    Raises:
        TypeError: If the source is of another kind.
        FileNotFoundError: If there is nothing at the path.
        ValueError: If the source cannot be read; the message names what is wrong with it.
    """
    listed: tuple[str, Any, Mapping[str, Any]]
    if isinstance(source, nn.Module):
        listed = stored_in_module(source)
    elif isinstance(source, Mapping):
        listed = stored_in_mapping(source)
    elif isinstance(source, (str, PathLike)):
        listed = stored_in_files(source)
    else:
        raise TypeError(f"expected a model, a state dict or a path to safetensors, got {type(source).__name__}")
    label, stored, config = listed
    return select(label, stored, config=config, modules=modules, conv1d=conv1d)
