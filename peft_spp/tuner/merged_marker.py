# SPDX-License-Identifier: Apache-2.0
"""A model's configuration lists the adapters that were merged into it, and none is loaded onto it again silently."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, cast

from torch import Tensor, nn

from ..checkpoints.merged import MERGED, Factor, adapter_id, is_merged, merged_adapters
from .config import SPPConfig
from .layer import Linear
from .saved_adapter import SavedAdapter
from .whole_parameters import is_sharded, whole_parameters, whole_shape


def merged_ids(model: nn.Module, adapter_names: list[str]) -> list[str]:
    """
    The ids of adapters of a model, for [`mark_merged`] once they are merged.

    Args:
        model (`nn.Module`): The model with the adapters.
        adapter_names (`list[str]`): The adapters.

    Returns:
        `list[str]`: An id for each; none for an adapter whose factors this process cannot have whole, as with FSDP1.
    """
    if not _keeps_attributes(model):
        return []
    return [identity for name in adapter_names if (identity := _identity(model, name)) is not None]


def _identity(model: nn.Module, adapter_name: str) -> str | None:
    layers = [one for one in model.modules() if isinstance(one, Linear) and adapter_name in one.spp_A]
    if not layers or not all(_is_whole(layer, adapter_name) for layer in layers):
        return None
    return adapter_id(_factors(layers, adapter_name))


def _is_whole(layer: Linear, adapter_name: str) -> bool:
    parameters = [one for part in _parts(layer, adapter_name) for one in part.parameters()]
    return all(math.prod(whole_shape(one)) and (is_sharded(one) or not one.is_meta) for one in parameters)


def _factors(layers: Iterable[Linear], adapter_name: str) -> Iterator[Factor]:
    for layer in layers:
        part_A, part_B = _parts(layer, adapter_name)
        with whole_parameters(part_A), whole_parameters(part_B):
            A, B = cast(Tensor, part_A.weight), cast(Tensor, part_B.weight)
            yield layer.module_name, float(layer.scaling[adapter_name]), A, B


def _parts(layer: Linear, adapter_name: str) -> tuple[nn.Module, nn.Module]:
    return layer.spp_A[adapter_name], layer.spp_B[adapter_name]


def mark_merged(model: nn.Module, identities: list[str]) -> None:
    """
    List adapters in the configuration of a model that they were merged into; `save_pretrained` writes it.

    Args:
        model (`nn.Module`): The merged model.
        identities (`list[str]`): The ids of the adapters.
    """
    if identities:
        setattr(model.config, MERGED, [*merged_adapters(vars(model.config)), *identities])


def check_not_merged(saved: SavedAdapter, model: nn.Module, config: SPPConfig, adapter_name: str) -> None:
    """
    Warn or raise, as `check_base` says, if an adapter is loaded onto a model that it was merged into.

    Args:
        saved (`SavedAdapter`): The adapter.
        model (`nn.Module`): The model.
        config (`SPPConfig`): The configuration of the adapter.
        adapter_name (`str`): The name of the adapter.

    Raises:
        ValueError: If `check_base` is `"error"`.
    """
    present = merged_adapters(vars(model.config)) if _keeps_attributes(model) else ()
    if not present or config.check_base == "off":
        return
    factors = (
        (name, saved.alpha(name) / one["A"].shape[0], one["A"].load(), one["B"].load())
        for name, one in saved.factors.items()
    )
    if not is_merged(adapter_id(factors), vars(model.config)):
        return
    message = (
        f"Adapter {adapter_name!r} was merged into this model before, and is applied twice now. Load the base model "
        f"that it was trained on ({config.base_model_name_or_path}), or use the merged model without the adapter."
    )
    if config.check_base == "error":
        raise ValueError(message)
    warnings.warn(message, stacklevel=2)


def _keeps_attributes(model: Any) -> bool:
    """Whether a model has a configuration of Transformers, which is saved with all its attributes."""
    return hasattr(getattr(model, "config", None), "to_json_file")
