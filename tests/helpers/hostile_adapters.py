# SPDX-License-Identifier: Apache-2.0
"""Adapters with something wrong in them, and that loading one is refused."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_spp import SPPConfig

from helpers.tiny import MLP, randomize
from helpers.unchanged import refused


CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
FACTOR = "base_model.model.lin0.spp_A.weight"
OTHER_FACTOR = "base_model.model.lin0.spp_B.weight"


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


def saved(folder: Path, **settings) -> Path:
    model = get_peft_model(MLP(), SPPConfig(**{"r": 3, "target_modules": ["lin0", "lin1"], **settings}))
    randomize(model)
    model.save_pretrained(folder)
    return folder


def pickled(adapter: Path, content: object = None) -> None:
    torch.save(load_file(adapter / WEIGHTS) if content is None else content, adapter / PICKLED)
    (adapter / WEIGHTS).unlink()


def assert_refused(folder: Path, *named: object, **options) -> None:
    """By `PeftModel.from_pretrained` and `load_adapter`, with an error that names it and the models as they were."""
    base = MLP()
    with refused(base) as error:
        PeftModel.from_pretrained(base, folder, **options)
    assert type(error.value) is ValueError
    for what in named:
        assert str(what) in str(error.value)

    other = get_peft_model(MLP(), SPPConfig(r=2, target_modules=["lin1"]))
    with refused(other):
        other.load_adapter(folder, "second")
