# SPDX-License-Identifier: Apache-2.0
"""Saving an adapter so that a process killed at any moment leaves the old adapter or the new one.

PEFT writes into the folder that it is given, file after file. It is given a hidden folder inside of it instead, and
the files are put in their places when all of them are on the disk. Where an old adapter is replaced there is a moment
in which its settings lie next to new files. So all files carry the `weights_id` of the settings and the record of the
base model: if it is the same they belong together, if not the adapter is refused. Pickled weights cannot carry it; the
record, which is put in its place before the weights, does.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..durable import OUT_OF_SPACE, no_space, publish, sync_file, sync_folder, working_folder
from ..model_card import why_unreadable
from ..sparsity.base_masks import BASE_MASKS, WEIGHTS_ID
from .adapter_files import find_weights, list_tensors
from .adapter_tensors import check_saved
from .config import SPPConfig


_CARD = "README.md"


def save_durably(save_pretrained: Callable[..., None]) -> Callable[..., None]:
    """Make `PeftModel.save_pretrained` durable where it saves SPP adapters. Whatever else it saves is left to PEFT."""
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
            card = Path(folder, _CARD)
            problem = why_unreadable(card) if card.is_file() else None
            if card.is_file() and problem is None:
                shutil.copyfile(card, working / _CARD)  # PEFT adds to it
            call.arguments["save_directory"] = str(working)
            save_pretrained(*call.args, **call.kwargs)
            selected = call.arguments["selected_adapters"]
            for name in model.peft_config if selected is None else selected:
                own = working if name == "default" else working / name
                if model.peft_config[name].peft_type == "SPP":
                    _check_all_saved(own, model, name)
                    _write_id_into_weights(own)
            if problem is not None:
                warnings.warn(f"The model card {card} stays as it is: {problem}.", stacklevel=2)
                (working / _CARD).unlink(missing_ok=True)
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


def _check_all_saved(folder: Path, model: PeftModel, adapter_name: str) -> None:
    weights = find_weights(folder)
    if weights is None:
        raise RuntimeError(f"PEFT did not write the weights of adapter {adapter_name!r}. Nothing was saved.")
    tensors, _ = list_tensors(weights, pickled=True)
    check_saved(tensors, model, cast(SPPConfig, model.peft_config[adapter_name]), adapter_name)


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


# the record comes before the weights, and the settings come last: before that they tell that a save was interrupted
_ORDER = (BASE_MASKS, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, CONFIG_NAME)
_OTHER_FORM = {SAFETENSORS_WEIGHTS_NAME: WEIGHTS_NAME, WEIGHTS_NAME: SAFETENSORS_WEIGHTS_NAME}


def _publish_all(working: Path, folder: Path) -> None:
    """Put all files in their places, and remove weights that the new ones replace in the other format."""
    files = sorted(path for path in working.rglob("*") if path.is_file())
    for file in files:
        sync_file(file)
    for file in sorted(files, key=lambda one: (one.parent, _ORDER.index(one.name) if one.name in _ORDER else -1)):
        place = folder / file.relative_to(working)
        if not place.parent.is_dir():
            place.parent.mkdir(parents=True, exist_ok=True)
            sync_folder(place.parent.parent)
        publish(file, place)
        if file.name in _OTHER_FORM:
            place.with_name(_OTHER_FORM[file.name]).unlink(missing_ok=True)
            sync_folder(place.parent)
