# SPDX-License-Identifier: Apache-2.0
"""How Transformers saves compressed weights."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightTransform, revert_weight_conversion

from ..checkpoints.compressed_files import COLUMNS, bitmask_of, columns_text
from ..functional.bitmask import BITS
from .expert_files import stored_experts
from .experts import find_compressed_stacks
from .layer import CompressedLinear


def saving_transforms(model: PreTrainedModel) -> list[WeightTransform]:
    """The rules by which Transformers saves a model."""
    transforms: list[WeightTransform] | None = getattr(model, "_weight_conversions", None)
    return get_model_conversion_mapping(model, add_legacy=False) if transforms is None else transforms


def state_and_metadata(model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
    """
    What is written of a model, and the metadata of its files.

    Args:
        model (`PreTrainedModel`): The model.

    Returns:
        `tuple[dict[str, torch.Tensor] | None, dict[str, str]]`: The tensors, if they are other ones than the model's,
        and for those who read the files without the model the columns of each weight.

    Raises:
        ValueError: If experts are to be taken apart that are not in memory, or weights are in a dtype that files of
            compressed weights do not have.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        return None, {}  # only adapters are saved
    stacks = {name: module.compressed(stack) for name, (module, stack) in find_compressed_stacks(model).items()}
    stored = stored_experts(model, stacks, saving_transforms(model)) if stacks else {}
    weights = {
        f"{name}.weight": (layer.weight, layer.in_features)
        for name, layer in model.named_modules()
        if isinstance(layer, CompressedLinear)
    }
    weights |= {name: (tensors[name], columns) for name, (tensors, columns) in stored.items()}
    if not weights:
        return None, {}
    for name, (values, _) in weights.items():
        if values.dtype not in BITS:
            raise ValueError(
                f"{name} is compressed and in {values.dtype}, and files hold float32, bfloat16 or float16: convert "
                "the model first, as with model.to(torch.float32), or call peft_spp.decompress(model)"
            )
    columns_of = {id(values): columns for values, columns in weights.values()}
    # with `save_original_format=False` the tensors keep the model's names, which nothing here is told
    named = {name: values for name, (values, _) in weights.items()}
    named |= revert_weight_conversion(model, dict(named))
    metadata = {COLUMNS: columns_text({name: columns_of[id(values)] for name, values in named.items()})}
    parts = {name for stack in stacks for name in (stack, bitmask_of(stack))}
    if parts.issuperset(name for tensors, _ in stored.values() for name in tensors):
        return None, metadata
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in parts}
    return {**state, **{name: one for tensors, _ in stored.values() for name, one in tensors.items()}}, metadata
