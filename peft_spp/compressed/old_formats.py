# SPDX-License-Identifier: Apache-2.0
"""
How Transformers loads the sparse formats that compressed-tensors has removed.

`quant_method: compressed-tensors` belongs to Transformers' own quantizer, which no longer reads them. Where it is not
named, Transformers takes their tensors for unexpected ones, and draws random weights. So the function that chooses the
quantizer is wrapped: such a model is loaded as a plain one with [`BitmaskConfig`], and [`BitmaskHfQuantizer`] makes
each weight dense when it comes, and compresses it before the next one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, modeling_utils
from transformers.core_model_loading import WeightConverter, WeightRenaming, WeightTransform, rename_source_key

from ..checkpoints.old_compressed_files import (
    CONFIG_KEYS,
    Parts,
    find_parts,
    join_parts,
    names_parameters,
    sparse_format,
)
from ..checkpoints.safetensors_files import read_header
from ..functional.compressed import decompress
from .config import BitmaskConfig


DECOMPRESS = "make plain safetensors of it with `peft-spp decompress`"

_VALUES, _BITMASK, _UNREAD = "compressed", "bitmask", ("shape", "row_offsets")


def load_old_formats() -> None:
    """Make `from_pretrained` load checkpoints in these formats. A second call does nothing."""
    original = modeling_utils.get_hf_quantizer
    if hasattr(original, "loads_old_formats"):
        return

    @functools.wraps(original)
    def get_hf_quantizer(config: Any, quantization_config: Any, *args: Any, **kwargs: Any) -> Any:
        name = sparse_format({key: _plain(getattr(config, key, None)) for key in CONFIG_KEYS})
        if name is not None:
            if not isinstance(quantization_config, BitmaskConfig | None):
                raise ValueError(
                    f"the model is stored in the format {name!r} of compressed-tensors, and loads with BitmaskConfig "
                    f"or no quantization_config, not with {type(quantization_config).__name__}: {DECOMPRESS}"
                )
            quantization_config = quantization_config or BitmaskConfig()
            for key in CONFIG_KEYS:
                if hasattr(config, key):
                    delattr(config, key)
        quantizer, config, device_map = original(config, quantization_config, *args, **kwargs)
        if name is not None:
            quantizer.old_format = name
        return quantizer, config, device_map

    get_hf_quantizer.loads_old_formats = True  # type: ignore[attr-defined]
    modeling_utils.get_hf_quantizer = get_hf_quantizer


def find_old_weights(files: Iterable[str]) -> dict[str, Parts]:
    """The tensors of each parameter in these formats in some files; an error if one is missing or of another dtype."""
    paths = [Path(file) for file in files if str(file).endswith(".safetensors")]
    # the bitmask comes in the dtype of the model, in which a byte is exact
    return find_parts({one.key: one.dtype for path in paths for one in read_header(path)})


def check_names(names: Iterable[str], model: PreTrainedModel, transforms: Iterable[WeightTransform]) -> None:
    """Raise a `ValueError` if a weight in the files is not one of the model's, but a part of one."""
    transforms = list(transforms)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    state = model.state_dict()
    for name in sorted(names):
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if pattern is not None:
            raise ValueError(
                f"{name} is compressed, and Transformers makes {renamed} of it and others: {DECOMPRESS}, and load that"
            )


def converters(found: Mapping[str, Parts], operation: Any) -> list[WeightConverter]:
    """What makes one tensor of those of a parameter."""
    whole = names_parameters(parts.values for parts in found.values())
    targets = {"([^.]+)": r"\1"} if whole else {r"(\.bias)": r"\1", "([^.]+)": r"\1.weight"}
    return [
        WeightConverter([rf"{start}\.{part}$" for part in (_VALUES, _BITMASK, *_UNREAD)], target, [operation])
        for start, target in targets.items()
    ]


def read_weight(parameter: Tensor, name: str, tensors: dict[str, Any]) -> Tensor:
    """Make the dense weight of the tensors that were read, which are given by the patterns of their names."""
    values, bitmask = (_find(tensors, part) for part in (_VALUES, _BITMASK))
    return decompress(join_parts(name, values, bitmask.to(torch.uint8), tuple(parameter.shape)))


def save_in_our_format(model: PreTrainedModel) -> None:
    """Take away what would write the tensors as they were read."""
    conversions: Any = model._weight_conversions
    conversions[:] = [one for one in conversions if not one.source_patterns[0].endswith(rf"\.{_VALUES}$")]


def _find(tensors: dict[str, Any], part: str) -> Tensor:
    found = next(one for pattern, one in tensors.items() if pattern.endswith(rf"\.{part}$"))
    tensor: Tensor = found if isinstance(found, Tensor) else found[0]
    return tensor


def _plain(value: Any) -> Any:
    return value.to_dict() if hasattr(value, "to_dict") else value
