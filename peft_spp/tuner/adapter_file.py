# SPDX-License-Identifier: Apache-2.0
"""Checks of a saved adapter before a model is changed for it."""

from __future__ import annotations

from pathlib import Path

import torch
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open


def check_adapter_file(folder: str | Path) -> None:
    """
    Check that the weights of an adapter in a local folder can be read and are finite.

    Args:
        folder (`str` or `Path`): The folder of the adapter. A folder without safetensors weights passes.

    Raises:
        ValueError: If the file is damaged or a tensor has a value that is not finite; the message names both.
    """
    path = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise ValueError(
                        f"The adapter file {path} is broken: tensor {name!r} has values that are NaN or infinite. "
                        "Load an earlier checkpoint of the adapter."
                    )
    except SafetensorError as error:
        raise ValueError(
            f"The adapter file {path} cannot be read ({error}). It may have been cut short; copy it again."
        ) from error
