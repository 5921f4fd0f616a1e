# SPDX-License-Identifier: Apache-2.0
"""What an adapter folder is made of, and writing it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard
from peft import PeftConfig
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoints.output import OutputFolder
from ..checkpoints.own_files import CARD
from ..durable import sync_file
from ..model_card import new_model_card
from .report import ExchangedModule


@dataclass(frozen=True)
class AdapterContent:
    """An adapter in memory, ready to be written to a folder."""

    config: PeftConfig  # its settings
    tensors: Mapping[str, Tensor]  # its tensors, under the names that PEFT saves them by
    modules: tuple[ExchangedModule, ...]  # the adapted modules
    others: tuple[str, ...]  # the names of the tensors that are not factors
    text: str  # the text of its model card, without what an SPP configuration adds when it is saved

    def card(self) -> ModelCard:
        task_type = getattr(self.config.task_type, "value", self.config.task_type)
        tags = [str(getattr(self.config.peft_type, "value", self.config.peft_type)).lower()]
        return new_model_card(self.config.base_model_name_or_path, task_type, tags, self.text)


def write_adapter(out: OutputFolder, content: AdapterContent, card: ModelCard) -> None:
    weights = out.new_file(Path(SAFETENSORS_WEIGHTS_NAME))
    save_file(dict(content.tensors), weights, metadata={"format": "pt"})
    card.save(weights.with_name(CARD))
    content.config.save_pretrained(str(weights.parent))
    for file in weights.parent.iterdir():
        sync_file(file)
