# SPDX-License-Identifier: Apache-2.0
"""Saving an adapter so that a process killed at any moment leaves the old adapter or the new one.

PEFT writes into the folder that it is given, file after file. It is given a hidden folder inside of it instead, and
the files are put in their places when all of them are on the disk. Where an old adapter is replaced there is a moment
in which its settings lie beside the new weights. So both carry the `weights_id` of the settings: it is the same if the
settings are, and then the two belong together; if it is not, loading tells.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..durable import OUT_OF_SPACE, no_space, publish, sync_file, sync_folder, working_folder


WEIGHTS_ID = "weights_id"
"""The key of the settings' id, in the configuration and in the metadata of the weights."""

_CARD = "README.md"
# what may differ between two saves of settings that give the same model
_NOT_IN_ID = (WEIGHTS_ID, "peft_version", "inference_mode", "check_base")


def settings_id(settings: Mapping[str, Any]) -> str:
    """
    Tell settings that give another meaning to the same weights apart.

    Args:
        settings (`Mapping[str, Any]`): The content of an adapter's configuration file.

    Returns:
        `str`: The same for the same settings.
    """
    relevant = {key: value for key, value in settings.items() if key not in _NOT_IN_ID}
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:32]


def write_settings_id(folder: Path) -> None:
    """
    Add the id of the settings to a configuration that PEFT has written.

    Args:
        folder (`Path`): The folder that it is in.
    """
    file = folder / CONFIG_NAME
    settings = json.loads(file.read_text(encoding="utf-8"))
    # PEFT lists a set in the order of its hashes, which is another in every process
    for key in ("target_modules", "exclude_modules"):
        if isinstance(settings.get(key), list):
            settings[key] = sorted(settings[key])
    settings[WEIGHTS_ID] = settings_id(settings)
    file.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")


def save_durably(save_pretrained: Callable[..., None]) -> Callable[..., None]:
    """
    Make `PeftModel.save_pretrained` durable where it saves SPP adapters. Whatever else it saves is left to PEFT.

    Args:
        save_pretrained (`Callable`): The method of PEFT.

    Returns:
        `Callable`: The method to put in its place, which has the same arguments. A second call returns its argument.
    """
    if hasattr(save_pretrained, "saves_durably"):
        return save_pretrained
    signature = inspect.signature(save_pretrained)

    @functools.wraps(save_pretrained)
    def save(*args: Any, **kwargs: Any) -> None:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        model, folder = call.arguments["self"], call.arguments["save_directory"]
        is_ours = any(config.peft_type == "SPP" for config in model.peft_config.values())
        # the other processes of a distributed training write nothing
        if not is_ours or not call.arguments["is_main_process"] or os.path.isfile(folder):
            save_pretrained(*args, **kwargs)
            return
        with _errors_of_the_disk(Path(folder)), working_folder(folder) as working:
            if os.path.isfile(os.path.join(folder, _CARD)):
                shutil.copyfile(os.path.join(folder, _CARD), working / _CARD)  # PEFT adds to it
            call.arguments["save_directory"] = str(working)
            save_pretrained(*call.args, **call.kwargs)
            for config in working.rglob(CONFIG_NAME):
                _write_id_into_weights(config.parent)
            _publish_all(working, Path(folder))

    save.saves_durably = True  # type: ignore[attr-defined]
    return save


@contextmanager
def _errors_of_the_disk(folder: Path) -> Iterator[None]:
    """Safetensors tells the error of the system in words only."""
    try:
        yield
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        if int(code[1]) in OUT_OF_SPACE:
            raise no_space(int(code[1]), folder) from error
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(folder)) from error


def _write_id_into_weights(folder: Path) -> None:
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    if not weights.is_file():
        return
    with safe_open(weights, framework="pt") as file:
        metadata = file.metadata() or {}
    found = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))[WEIGHTS_ID]
    # not onto the file itself, which is mapped into memory
    with_id = folder / f"{SAFETENSORS_WEIGHTS_NAME}.with-id"
    save_file(load_file(weights), with_id, metadata={**metadata, WEIGHTS_ID: found})
    os.replace(with_id, weights)


def _publish_all(working: Path, folder: Path) -> None:
    """Put all files in their places: each adapter's weights first, then its configuration."""
    files = sorted(path for path in working.rglob("*") if path.is_file())
    for file in files:
        sync_file(file)
    for file in sorted(files, key=lambda one: (one.parent, one.name == CONFIG_NAME)):
        place = folder / file.relative_to(working)
        if not place.parent.is_dir():
            place.parent.mkdir(parents=True, exist_ok=True)
            sync_folder(place.parent.parent)
        publish(file, place)
