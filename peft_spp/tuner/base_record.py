# SPDX-License-Identifier: Apache-2.0
"""Recording the base model that an adapter is trained on, and comparing it with the one that it is loaded onto."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..checkpoints.merged import is_merged, merged_adapters
from ..functional import Compressed
from ..reports import some
from ..sparsity.base_masks import BaseRecord, no_record, record_weights, warn_or_raise
from ..sparsity.mask_record import MaskRelation
from .config import SPPConfig
from .engines import whole_parameters
from .layer import AdaptedLayer
from .param_wrapper import ParamWrapper
from .quantized import QuantizedLinear
from .saved_adapter import SavedAdapter
from .targets import shortest_unambiguous_suffix


# how many layers a warning names, and how many endings it proposes
_SHOWN, _SHOWN_ENDINGS = 3, 8


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


def warn_of_dense_layers(record: BaseRecord, model: nn.Module, adapter_name: str) -> None:
    """Warn of adapted layers that hold no zeros, by what the record has read of them."""
    # the zeros of a quantized weight are those of its rounding
    quantized = {layer.module_name for layer in _quantizing_layers(model, adapter_name)}
    masks = {name: mask for name, mask in record.masks.items() if name not in quantized}
    dense = [name for name, mask in masks.items() if not mask.zeros]
    if not dense:
        return
    if len(dense) == len(masks):
        warnings.warn(
            f"None of the {len(dense)} adapted layers holds a zero, so SPP has nothing to preserve. Prune the base "
            "model first (`peft-spp prune`); a dense one is better tuned with LoRA.",
            stacklevel=4,
        )
        return
    wrapped = {one.module_name for one in model.modules() if isinstance(one, ParamWrapper)}
    parameters = [name for name in dense if name in wrapped]
    if parameters:
        dense = [name for name in dense if name not in parameters]
        warnings.warn(
            f"{len(parameters)} adapted parameters hold no zeros, so SPP has nothing to preserve there: "
            f"{some(parameters, _SHOWN)}. To leave them out, take them out of `target_parameters`.",
            stacklevel=4,
        )
    if not dense:
        return
    sparse = [name for name in masks if name not in dense and name not in parameters]
    endings = sorted({shortest_unambiguous_suffix(name, sparse) or name for name in dense})
    shown = f"{endings}" if len(endings) <= _SHOWN_ENDINGS else "..."
    warnings.warn(
        f"{len(dense)} of {len(masks)} adapted layers hold no zeros, so SPP has nothing to preserve there: "
        f"{some(dense, _SHOWN)}. To leave them out, set `exclude_modules={shown}`.",
        stacklevel=4,
    )


def keeps_attributes(model: Any) -> bool:
    """Whether a model has a configuration of Transformers, which is saved with all its attributes."""
    return hasattr(getattr(model, "config", None), "to_json_file")


def _weights(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Tensor | Compressed]]:
    for module in model.modules():
        if isinstance(module, AdaptedLayer) and adapter_name in module.spp_A:
            with whole_parameters(module):
                weight = module.recorded_weight()
                stored = weight.values if isinstance(weight, Compressed) else weight
                # a weight that is on the meta device, or that FSDP1 has sharded, cannot be looked at
                if not stored.is_meta and weight.shape[-2:] == (module.out_features, module.in_features):
                    yield module.module_name, weight


def _quantization(model: nn.Module, adapter_name: str) -> str | None:
    """How the adapted layers are quantized, such as `"bitsandbytes nf4"`."""
    return ", ".join(sorted({layer.quantization for layer in _quantizing_layers(model, adapter_name)})) or None


def _quantizing_layers(model: nn.Module, adapter_name: str) -> Iterator[QuantizedLinear]:
    for module in model.modules():
        if isinstance(module, QuantizedLinear) and module.quantizes and adapter_name in module.spp_A:
            yield module
