# SPDX-License-Identifier: Apache-2.0
"""The files of a saved adapter: where they are, what tensors they hold, and which of them belong together."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import struct
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError

from ..checkpoints.file_bytes import open_safetensors
from ..checkpoints.safetensors_files import read_header, read_json
from ..checkpoints.stored import Stored
from ..sparsity.base_masks import BASE_MASKS, WEIGHTS_ID, BaseRecord, read_base_masks, write_base_masks


PREFIX = "base_model.model."
"""What PEFT puts before the names of a model's tensors when it saves an adapter."""

FACTOR = re.compile(r"(.+)\.spp_([AB])\.weight")
"""The names of the factors in an adapter's weights, without the prefix."""

NOT_A_PICKLE = (
    *(pickle.UnpicklingError, struct.error, RuntimeError, OSError, EOFError, ValueError, LookupError),
    *(AttributeError, TypeError, ImportError, MemoryError, AssertionError),
)
"""What `torch.load` raises where a file is damaged, besides what is not supposed to be loaded."""

ADAPTER_FILES = (CONFIG_NAME, BASE_MASKS, SAFETENSORS_WEIGHTS_NAME)
"""The files that an adapter is made of."""

# what may differ between two saves of settings that give the same model
_NOT_IN_ID = (WEIGHTS_ID, "peft_version", "inference_mode", "check_base")


def find_file(
    source: str | os.PathLike[str], name: str, subfolder: str | None = None, hub: Mapping[str, Any] | None = None
) -> Path | None:
    """Find a file of an adapter; from the Hub it is downloaded."""
    folder = Path(source, subfolder or "")
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    try:
        return Path(hf_hub_download(os.fspath(source), name, subfolder=subfolder, **(hub or {})))
    except (EntryNotFoundError, HFValidationError):
        return None  # also for a folder that is not there


def named_adapters(folder: Path) -> list[Path]:
    """The adapters in subfolders of a folder, where PEFT saves those that are not called "default"."""
    return [one for one in sorted(folder.iterdir()) if one.is_dir() and _is_spp(one / CONFIG_NAME)]


def _is_spp(file: Path) -> bool:
    try:
        return file.is_file() and read_json(file).get("peft_type") == "SPP"
    except ValueError:
        return True  # it is reported when the adapter is read


def find_weights(
    source: str | os.PathLike[str], subfolder: str | None = None, hub: Mapping[str, Any] | None = None
) -> Path | None:
    """Find the file that PEFT will load the weights of an adapter from: safetensors if there is one, else pickled."""
    names = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    return next((file for name in names if (file := find_file(source, name, subfolder, hub)) is not None), None)


def read_record(config_file: Path, masks_file: Path | None) -> tuple[BaseRecord | None, str | None]:
    """
    Read the record of the base model that is next to a configuration, and check that the two belong together. It
    returns the record, and the id of the settings, as far as the files have them.
    """
    weights_id = read_json(config_file, strict=True).get(WEIGHTS_ID)
    if weights_id is not None and not isinstance(weights_id, str):
        raise ValueError(f"{config_file}: `{WEIGHTS_ID}` should be a string but the value passed is {weights_id!r}")
    if masks_file is None:
        return None, weights_id
    record, masks_id = read_base_masks(masks_file)
    check_same_save(masks_file, masks_id, weights_id)
    return record, weights_id


def check_same_save(file: Path, its_id: str | None, weights_id: str | None) -> None:
    """Check that a file was saved with the settings next to it: an interrupted save may have left older ones."""
    if None not in (its_id, weights_id) and its_id != weights_id:
        raise ValueError(
            f"{file} was saved with different settings than the {CONFIG_NAME} next to it: a save was interrupted, or "
            "one of the two was copied from elsewhere. Save the adapter again, or load an earlier checkpoint."
        )


def settings_id(settings: Mapping[str, Any], record: BaseRecord | None) -> str:
    """Tell settings that give another meaning to the same weights apart."""
    relevant = {key: value for key, value in settings.items() if key not in _NOT_IN_ID}
    relevant["base"] = None if record is None else record.to_dict()
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:32]


def write_settings_id(folder: Path, record: BaseRecord | None) -> None:
    """Add the id of the settings to a configuration that PEFT has written, and write the record of the base model."""
    file = folder / CONFIG_NAME
    settings = json.loads(file.read_text(encoding="utf-8"))
    # PEFT lists a set in the order of its hashes, which is another in every process
    for key in ("target_modules", "exclude_modules"):
        if isinstance(settings.get(key), list):
            settings[key] = sorted(settings[key])
    settings[WEIGHTS_ID] = settings_id(settings, record)
    file.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
    write_base_masks(folder, record, settings[WEIGHTS_ID])


def list_tensors(file: Path, pickled: bool) -> tuple[dict[str, Stored], str | None]:
    """
    List the tensors of an adapter. It returns the tensors by name, and the id of the settings they were saved with.
    """
    if file.name != SAFETENSORS_WEIGHTS_NAME:
        if not pickled:
            raise ValueError(
                f"{file} is a pickle file, which can run code when it is loaded, so it is not read. Ask for the "
                f"adapter in safetensors (`save_pretrained` writes {SAFETENSORS_WEIGHTS_NAME}), or load it into a "
                "model with `weights_only=True`, which unpickles only weights."
            )
        return list_loaded(file, _unpickle(file)), None
    try:
        with open_safetensors(file) as tensors:
            weights_id = (tensors.metadata() or {}).get(WEIGHTS_ID)
    except SafetensorError as error:
        raise ValueError(
            f"The adapter file {file} cannot be read ({error}). It may be truncated; copy it again."
        ) from error
    return {one.key: one for one in read_header(file)}, weights_id


def list_loaded(origin: object, content: object) -> dict[str, Stored]:
    """List tensors that are in memory."""
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()
    ):
        raise ValueError(f"{origin} does not contain a dictionary of tensors")
    for name, tensor in content.items():
        if tensor.layout is not torch.strided or tensor.is_meta:
            kind = "on the meta device, without values" if tensor.is_meta else f"stored as {tensor.layout}"
            raise ValueError(f"{origin}: tensor {name!r} is {kind}. Save the adapter again with dense tensors.")
    return {
        name: Stored(name, tuple(tensor.shape), tensor.dtype, partial(content.__getitem__, name))
        for name, tensor in content.items()
    }


def _unpickle(file: Path) -> object:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except NOT_A_PICKLE as error:
        raise ValueError(
            f"The adapter file {file} cannot be read without running code in it, which peft_spp does not do "
            f"({error}). Ask for the adapter in safetensors."
        ) from error
