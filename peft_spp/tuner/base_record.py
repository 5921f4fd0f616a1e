# SPDX-License-Identifier: Apache-2.0
"""Recording the base model that an adapter is trained on, and comparing it with the one that it is loaded onto."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..checkpoints.merged import is_merged, merged_adapters
from ..functional import Compressed
from ..sparsity.base_masks import BaseRecord, no_record, record_weights, warn_or_raise
from ..sparsity.mask_record import MaskRelation
from .config import SPPConfig
from .engines import whole_parameters
from .layer import Linear
from .quantized import QuantizedLinear
from .saved_adapter import SavedAdapter


def record_base(model: nn.Module, adapter_name: str) -> BaseRecord:
    """Record the masks of the weights that an adapter adapts, and how the base model is quantized."""
    return BaseRecord(_quantization(model, adapter_name), record_weights(_weights(model, adapter_name)))


def relate_base(record: BaseRecord | None, model: nn.Module, adapter_name: str) -> dict[str, MaskRelation]:
    """How the masks of a base model relate to those that an adapter was trained on."""
    if record is None:
        warnings.warn(
            f"Adapter {adapter_name!r} has no record of its base model's masks, so they cannot be compared. It was "
            "saved without one, or the file was not copied with it.",
            stacklevel=3,
        )
        return {}
    return record.relate(record_weights(_weights(model, adapter_name)))


def check_base(config: SPPConfig, model: nn.Module, adapter_name: str) -> None:
    """Warn or raise, as the configuration says, if the base model is not pruned where that of the training was."""
    record = config.base_record
    if record is None and config.check_base == "error":
        raise ValueError(no_record(f"Adapter {adapter_name!r}"))
    if config.check_base == "off" or record is None:
        return
    mismatch = record.mismatch(record_weights(_weights(model, adapter_name)), _quantization(model, adapter_name))
    if mismatch is None:
        return
    message = (
        f"Adapter {adapter_name!r} was trained on a base model with different masks, in {mismatch}. Load the base "
        f"model that it was trained on ({config.base_model_name_or_path}); merged into this one, it keeps the zeros "
        "of this one. Set `check_base='off'` if this is intended."
    )
    warn_or_raise(message, config.check_base)


def check_not_merged(saved: SavedAdapter, model: nn.Module, config: SPPConfig, adapter_name: str) -> None:
    """Warn or raise, as `check_base` says, if an adapter is loaded onto a model that it was merged into."""
    present = merged_adapters(vars(model.config)) if keeps_attributes(model) else ()
    if not present or config.check_base == "off":
        return
    if not is_merged(saved.identity, vars(model.config)):
        return
    message = (
        f"Adapter {adapter_name!r} is already merged into this model, so it is applied twice now. Load the base "
        f"model that it was trained on ({config.base_model_name_or_path}), or use the merged model without the "
        "adapter."
    )
    warn_or_raise(message, config.check_base)


def keeps_attributes(model: Any) -> bool:
    """Whether a model has a configuration of Transformers, which is saved with all its attributes."""
    return hasattr(getattr(model, "config", None), "to_json_file")


def _weights(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Tensor | Compressed]]:
    for module in model.modules():
        if isinstance(module, Linear) and adapter_name in module.spp_A:
            with whole_parameters(module):
                weight = module.recorded_weight()
                stored = weight.values if isinstance(weight, Compressed) else weight
                # a weight that is on the meta device, or that FSDP1 has sharded, cannot be looked at
                if not stored.is_meta and weight.shape[-2:] == (module.out_features, module.in_features):
                    yield module.module_name, weight


def _quantization(model: nn.Module, adapter_name: str) -> str | None:
    """How the adapted layers are quantized, such as `"bitsandbytes nf4"`."""
    layers = (m for m in model.modules() if isinstance(m, QuantizedLinear) and m.quantizes and adapter_name in m.spp_A)
    return ", ".join(sorted({layer.quantization for layer in layers})) or None
