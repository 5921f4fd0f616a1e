# SPDX-License-Identifier: Apache-2.0
"""Which backend serves a layer."""

from __future__ import annotations

import torch
from torch import nn

from .backend import Backend
from .bitmask import Bitmask
from .bnb import Bnb4bit, Bnb8bit
from .by_unit_vectors import Applied
from .hqq import Hqq
from .torchao import Torchao


# GPTQ and AWQ (GPT-QModel, AutoAWQ), AQLM, compressed-tensors, Quanto; BitNet and others inside Transformers
_APPLIED = (
    "gptqmodel",
    "awq",
    "aqlm",
    "compressed_tensors",
    "optimum.quanto",
    "transformers.integrations",
)

_backends: list[Backend] = [
    Bitmask(),
    Bnb4bit(),
    Bnb8bit(),
    Torchao(),
    Hqq(),
    *(Applied(package) for package in _APPLIED),
]


def find_backend(layer: nn.Module) -> Backend | None:
    """
    The backend of a quantized linear layer, the one registered last of those that match; `None` if there is none.
    """
    return next((backend for backend in reversed(_backends) if backend.matches(layer)), None)


def dequantized_weight(layer: nn.Module) -> torch.Tensor:
    """The weight of a quantized linear layer, shape `(out_features, in_features)`."""
    backend = find_backend(layer)
    if backend is None:
        raise ValueError(
            f"{type(layer).__name__} is not a supported quantized linear layer. Add support for it with "
            "`register_backend`."
        )
    return backend.dequantize(layer, backend.packed(layer))


def is_foreign(tensor: torch.Tensor) -> bool:
    """
    Whether a tensor is of another package's type, with its own operators; a quantized one where no backend matches.
    """
    kind = type(tensor)
    has_own_operators = kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    return has_own_operators and not kind.__module__.startswith("torch.")


def register_backend(backend: Backend) -> None:
    """
    Make SPP adapt the layers of another quantization package.

    Args:
        backend ([`Backend`]): It takes precedence over those that are there. `Applied("package")` serves for any
            package whose layers are linear maps with `in_features` and `out_features`.
    """
    _backends.append(backend)
