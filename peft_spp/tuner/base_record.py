# SPDX-License-Identifier: Apache-2.0
"""What an adapter remembers of the base model it was trained on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..sparsity.mask_record import MaskRecord, MaskRelation, record_mask
from .config import SPPConfig
from .layer import Linear
from .quantized import QuantizedLinear
from .whole_parameters import whole_parameters


# how many modules a message names
_SHOWN = 3


def record_base(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """
    Record the masks of the weights that an adapter adapts, and how the base model is quantised.

    Args:
        model (`nn.Module`): The base model, with the adapter in it.
        adapter_name (`str`): The name of the adapter.

    Returns:
        `dict[str, Any]`: Plain data for JSON: `"quantization"`, how the adapted layers are quantised or `None`, and
        `"masks"`, of their dequantised weights if so, a
        [`~peft_spp.sparsity.MaskRecord`] as a dict for each adapted module whose weight is in memory.
    """
    masks = {name: record.to_dict() for name, record in _masks(model, adapter_name).items()}
    return {"quantization": _quantization(model, adapter_name), "masks": masks}


def relate_base(record: Mapping[str, Any], model: nn.Module, adapter_name: str) -> dict[str, MaskRelation]:
    """
    How the masks of a base model relate to those that an adapter was trained on.

    Args:
        record (`Mapping[str, Any]`): What [`record_base`] gave.
        model (`nn.Module`): The base model, with the adapter in it.
        adapter_name (`str`): The name of the adapter.

    Returns:
        `dict[str, str]`: `"same"`, `"refined"` or `"different"` for each module that is recorded and in memory.

    Raises:
        ValueError: If the record is malformed; the message names the module.
    """
    return {name: then.relation_of(now) for name, (then, now) in _then_and_now(record, model, adapter_name).items()}


def read_masks(record: Mapping[str, Any]) -> dict[str, MaskRecord]:
    """
    Read the masks out of a record.

    Args:
        record (`Mapping[str, Any]`): What [`record_base`] gave, perhaps by way of a file.

    Returns:
        `dict[str, MaskRecord]`: The mask of each module.

    Raises:
        ValueError: If the record is malformed; the message names the module.
    """
    masks = record.get("masks") if isinstance(record, Mapping) else None
    if not isinstance(masks, Mapping):
        raise ValueError("`base_record` should have a dictionary 'masks'. Remove it from the adapter's configuration.")
    read = {}
    for name, data in masks.items():
        try:
            read[name] = MaskRecord.from_dict(data if isinstance(data, Mapping) else {})
        except ValueError as error:
            raise ValueError(
                f"`base_record` is broken at module {name!r}: {error}. Remove it from the adapter's configuration."
            ) from error
    return read


def check_base(config: SPPConfig, model: nn.Module, adapter_name: str) -> None:
    """
    Warn or raise, as the configuration says, if the base model is not pruned where that of the training was.

    Args:
        config (`SPPConfig`): The configuration of the adapter, with a `base_record`.
        model (`nn.Module`): The base model, with the adapter in it.
        adapter_name (`str`): The name of the adapter.

    Raises:
        ValueError: If a mask is different and `check_base` is `"error"`, or the record is malformed.
    """
    if config.check_base == "off" or config.base_record is None:
        return
    masks = _then_and_now(config.base_record, model, adapter_name)
    quantized_then, quantized_now = config.base_record.get("quantization"), _quantization(model, adapter_name)
    different = [
        name
        for name, (then, now) in masks.items()
        if then.relation_of(now) == "different"
        # rounding had made zeros of its own, which a base in full precision does not have
        and not (quantized_then and now.relation_of(then) == "refined")
    ]
    if not different:
        return
    shown = "; ".join(
        f"{name}: {_describe(masks[name][0])} then, {_describe(masks[name][1])} now" for name in different[:_SHOWN]
    )
    more = f" and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
    if quantized_then or quantized_now:
        more += f" (quantization: {quantized_then} then, {quantized_now} now)"
    message = (
        f"Adapter {adapter_name!r} was trained on a base model that is pruned in other places, in {len(different)} of "
        f"{len(masks)} modules: {shown}{more}. Load the base model that it was trained on "
        f"({config.base_model_name_or_path}); merged into this one, it keeps the zeros of this one. Set "
        "`check_base='off'` if that is what you want."
    )
    if config.check_base == "error":
        raise ValueError(message)
    warnings.warn(message, stacklevel=2)


def _then_and_now(
    record: Mapping[str, Any], model: nn.Module, adapter_name: str
) -> dict[str, tuple[MaskRecord, MaskRecord]]:
    """The recorded mask and that of this model, for each module that is recorded and in memory."""
    recorded = read_masks(record)
    return {name: (recorded[name], mask) for name, mask in _masks(model, adapter_name).items() if name in recorded}


def _describe(mask: MaskRecord) -> str:
    return f"{mask.pattern}, {mask.sparsity:.1%} zeros, {mask.shape[0]}x{mask.shape[1]}"


def _masks(model: nn.Module, adapter_name: str) -> dict[str, MaskRecord]:
    masks = {}
    for module in model.modules():
        if isinstance(module, Linear) and adapter_name in module.spp_A:
            with whole_parameters(module):
                weight = module.unmerged_weight()
                # a weight that is on the meta device, or that FSDP1 has sharded, cannot be looked at
                if not weight.is_meta and weight.shape[-2:] == (module.out_features, module.in_features):
                    # of a stack of experts the rows of all, one expert after the other
                    masks[module.module_name] = record_mask(weight.reshape(-1, module.in_features))
    return masks


def _quantization(model: nn.Module, adapter_name: str) -> str | None:
    """How the adapted layers are quantised, such as `"bitsandbytes nf4"`."""
    layers = (m for m in model.modules() if isinstance(m, QuantizedLinear) and adapter_name in m.spp_A)
    return ", ".join(sorted({layer.quantization for layer in layers})) or None
