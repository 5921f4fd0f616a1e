# SPDX-License-Identifier: Apache-2.0
"""The id that says which files of an adapter belong together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft.utils.constants import CONFIG_NAME

from ..sparsity.base_masks import WEIGHTS_ID, BaseRecord, write_base_masks


# what may differ between two saves of settings that give the same model
_NOT_IN_ID = (WEIGHTS_ID, "peft_version", "inference_mode", "check_base")


def settings_id(settings: Mapping[str, Any], record: BaseRecord | None) -> str:
    """
    Tell settings that give another meaning to the same weights apart.

    Args:
        settings (`Mapping[str, Any]`): The content of an adapter's configuration file.
        record (`BaseRecord`, *optional*): The record of its base model.

    Returns:
        `str`: The same for the same settings and the same record.
    """
    relevant = {key: value for key, value in settings.items() if key not in _NOT_IN_ID}
    relevant["base"] = None if record is None else record.to_dict()
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:32]


def write_settings_id(folder: Path, record: BaseRecord | None) -> None:
    """
    Add the id of the settings to a configuration that PEFT has written, and write the record of the base model.

    Args:
        folder (`Path`): The folder that it is in.
        record (`BaseRecord`, *optional*): The record.
    """
    file = folder / CONFIG_NAME
    settings = json.loads(file.read_text(encoding="utf-8"))
    # PEFT lists a set in the order of its hashes, which is another in every process
    for key in ("target_modules", "exclude_modules"):
        if isinstance(settings.get(key), list):
            settings[key] = sorted(settings[key])
    settings[WEIGHTS_ID] = settings_id(settings, record)
    file.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
    write_base_masks(folder, record, settings[WEIGHTS_ID])
