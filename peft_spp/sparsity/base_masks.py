# SPDX-License-Identifier: Apache-2.0
"""The record of a base model's masks, which is saved next to an adapter, and comparing it with another base model."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoints.names import paired_by_ends
from ..checkpoints.own_files import BASE_MASKS
from ..checkpoints.safetensors_files import read_json
from ..functional.bitmask import Compressed
from .mask_record import MaskRecord, MaskRelation, record_mask
from .sources import Weight, open_weights


WEIGHTS_ID = "weights_id"
"""The key of the settings' id: in the configuration, in this file and in the metadata of the weights."""

# how many modules a message names
_SHOWN = 3


def warn_or_raise(message: str, check_base: str, *, stacklevel: int = 2) -> None:
    """What `check_base` says to do about a base model that does not fit: raise a `ValueError`, or warn."""
    if check_base == "error":
        raise ValueError(message)
    warnings.warn(message, stacklevel=stacklevel + 1)


def no_record(adapter: str) -> str:
    """The message of `check_base="error"` about an adapter without a record."""
    return (
        f"{adapter} has no record of its base model, so check_base='error' cannot compare the two. Copy its "
        f"{BASE_MASKS} next to its adapter_config.json, or use check_base='warn' or 'off'."
    )


@dataclass(frozen=True)
class BaseRecord:
    """
    What is remembered of the base model that an adapter was trained on.

    Args:
        quantization (`str`, *optional*): How the adapted layers were quantized, such as `"bitsandbytes nf4"`.
        masks (`Mapping[str, MaskRecord]`):
            The mask of each adapted weight, by the name of its module. Of a stack of experts it is the mask of all
            rows, one expert after the other.
    """

    quantization: str | None = None
    masks: Mapping[str, MaskRecord] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data for JSON.

        Returns:
            `dict[str, Any]`: `"quantization"`, and `"masks"` with a dictionary for each module.
        """
        return {
            "quantization": self.quantization,
            "masks": {name: mask.to_dict() for name, mask in self.masks.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BaseRecord:
        """Read the result of [`to_dict`].

        Args:
            data (`Mapping[str, Any]`): The data.

        Returns:
            [`BaseRecord`]: The record.

        Raises:
            ValueError: If it is malformed; the message names the module.
        """
        masks, quantization = data.get("masks"), data.get("quantization")
        if not isinstance(masks, Mapping):
            raise ValueError("the record of the base model has no dictionary 'masks'")
        if quantization is not None and not isinstance(quantization, str):
            raise ValueError(f"the record of the base model has the quantization {quantization!r}, not a string")
        read = {}
        for name, mask in masks.items():
            try:
                read[name] = MaskRecord.from_dict(mask if isinstance(mask, Mapping) else {})
            except ValueError as error:
                raise ValueError(f"the record of the base model is broken at module {name!r}: {error}") from error
        return cls(quantization, read)

    def renamed(self, modules: Collection[str]) -> BaseRecord:
        """
        The same record under a model's names, which may be others than those of the model that it was made of.

        Args:
            modules (`Collection[str]`): The adapted modules of the model.

        Returns:
            [`BaseRecord`]: The record, without what has no name there.
        """
        if self.masks.keys() <= set(modules):
            return self
        pairs = paired_by_ends(self.masks, modules)
        return replace(self, masks={pairs[name]: mask for name, mask in self.masks.items() if name in pairs})

    def relate(self, masks: Mapping[str, MaskRecord]) -> dict[str, MaskRelation]:
        """
        How other masks relate to those of the record.

        Args:
            masks (`Mapping[str, MaskRecord]`): The masks of another base model, by module.

        Returns:
            `dict[str, str]`: For each module in both, `"same"`, `"refined"` (the same places are zero, and more are)
            or `"different"`.
        """
        return {name: then.relation_of(masks[name]) for name, then in self.masks.items() if name in masks}

    def mismatch(self, masks: Mapping[str, MaskRecord], quantization: str | None = None) -> str | None:
        """
        Describe where the masks of another base model differ.

        A base model in full precision passes for a quantized one if it has a part of its zeros: rounding makes zeros.

        Args:
            masks (`Mapping[str, MaskRecord]`): The masks of the other base model, by module.
            quantization (`str`, *optional*): How it is quantized.

        Returns:
            `str`, *optional*: How many modules differ, and the first of them; `None` if none does.
        """
        different = [
            name
            for name, relation in self.relate(masks).items()
            if relation == "different"
            and not (self.quantization and masks[name].relation_of(self.masks[name]) == "refined")
        ]
        if not different:
            return None
        shown = "; ".join(
            f"{name}: {_describe(self.masks[name])} then, {_describe(masks[name])} now" for name in different[:_SHOWN]
        )
        more = f" and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
        if self.quantization or quantization:
            more += f" (quantization: {self.quantization} then, {quantization} now)"
        compared = sum(name in masks for name in self.masks)
        return f"{len(different)} of {compared} modules: {shown}{more}"


def _describe(mask: MaskRecord) -> str:
    return f"{mask.pattern}, {mask.sparsity:.1%} zeros, {mask.shape[0]}x{mask.shape[1]}"


def record_weights(weights: Iterable[tuple[str, Tensor | Compressed]]) -> dict[str, MaskRecord]:
    return {name: record_mask(_as_matrix(weight)) for name, weight in weights}


def _as_matrix(weight: Tensor | Compressed) -> Tensor | Compressed:
    """A stack as one tall weight."""
    if isinstance(weight, Compressed):
        return weight._replace(bitmask=weight.bitmask.reshape(-1, weight.bitmask.shape[-1]))
    return weight.reshape(-1, weight.shape[-1])


def record_checkpoint(
    record: BaseRecord,
    source: str | os.PathLike[str],
    *,
    conv1d: bool | None = None,
    stored: Mapping[str, str] | None = None,
) -> dict[str, MaskRecord]:
    """
    Record the masks of a checkpoint on disk, in the modules that a record has. No model is built, and one tensor is in
    memory at a time.

    Args:
        record ([`BaseRecord`]): The record that says which modules count.
        source (`str` or `os.PathLike`): The safetensors file or folder of the base model.
        conv1d (`bool`, *optional*): Whether weights are stored `(in, out)`; by default the checkpoint tells.
        stored (`Mapping[str, str]`, *optional*):
            What the checkpoint calls modules of the record; by default the same, up to the model's prefix.

    Returns:
        `dict[str, MaskRecord]`: The mask of each module that the checkpoint has, by its name in the record. Modules
        whose weight is missing, or is quantized on disk, are left out.

    Raises:
        FileNotFoundError: If there is nothing at the path.
        ValueError: If a file is damaged.
    """
    found = open_weights(source, conv1d=conv1d).found
    prefix = _prefix(record.masks, found)

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name in record.masks:
            weight = found.get((stored or {}).get(name) or prefix(name))
            if weight is not None and weight.unreadable is None:
                tensor = weight.load()
                yield name, tensor.transpose(-1, -2) if weight.transposed else tensor

    return record_weights(weights())


def relate_checkpoint(
    record: BaseRecord, source: str | os.PathLike[str], *, conv1d: bool | None = None
) -> dict[str, MaskRelation]:
    """
    How the masks of a checkpoint on disk relate to those that an adapter was trained on; see [`record_checkpoint`].

    Args:
        record ([`BaseRecord`]): The record of the adapter.
        source (`str` or `os.PathLike`): The safetensors file or folder of the base model.
        conv1d (`bool`, *optional*): Whether weights are stored `(in, out)`; by default the checkpoint tells.

    Returns:
        `dict[str, str]`: `"same"`, `"refined"` or `"different"` for each module that both have.
    """
    return record.relate(record_checkpoint(record, source, conv1d=conv1d))


def _prefix(names: Iterable[str], found: Mapping[str, Weight]) -> Callable[[str], str]:
    """Maps names of modules to those of a checkpoint, where a model's body is saved without the model's prefix."""
    names = list(names)
    if not names or any(name in found for name in names):
        return lambda name: name
    first = names[0]
    for stored in found:
        added, removed = stored.removesuffix(f".{first}"), first.removesuffix(f".{stored}")
        if added != stored and all(f"{added}.{name}" in found for name in names):
            return partial("{}.{}".format, added)
        if removed != first and all(name.removeprefix(f"{removed}.") in found for name in names):
            return partial(_without, removed)
    return lambda name: name


def _without(prefix: str, name: str) -> str:
    return name.removeprefix(f"{prefix}.")


def write_base_masks(folder: Path, record: BaseRecord | None, weights_id: str) -> None:
    """Write the file of a record: one line for each module."""
    text = json.dumps({WEIGHTS_ID: weights_id} | ({} if record is None else record.to_dict()))
    # a line for each module
    text = text.replace('}, "', '},\n"').replace('"masks": {"', '"masks": {\n"')
    (folder / BASE_MASKS).write_text(f"{text}\n", encoding="utf-8")


def read_base_masks(file: Path) -> tuple[BaseRecord | None, str | None]:
    """Read the file of a record. It returns the record, if it holds one, and the id of the settings it belongs to."""
    content = read_json(file, strict=True)
    weights_id = content.get(WEIGHTS_ID)
    try:
        if weights_id is not None and not isinstance(weights_id, str):
            raise ValueError(f"`{WEIGHTS_ID}` should be a string but the value is {weights_id!r}")
        if weights_id is not None and "masks" not in content:
            return None, weights_id
        return BaseRecord.from_dict(content), weights_id
    except ValueError as error:
        raise ValueError(
            f"{file} is damaged: {error}. Copy it again, or delete it to load the adapter without checking its base "
            "model"
        ) from error
