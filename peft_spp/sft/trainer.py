# SPDX-License-Identifier: Apache-2.0
"""The trainers of the commands: TRL's, with SPP's model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from huggingface_hub import ModelCard
from peft import PeftModel

from ..model_card import CARD, PLACEHOLDER, update_model_card
from ..tuner import SPPConfig


# what TRL writes of a base model that is a folder, and of an adapter that is not on the Hub
_NO_BASE = "[None](https://huggingface.co/None)"
_NO_MODEL = 'model="None"'


class Carded:
    """With one of TRL's trainers: its model cards, also those it pushes, say how an SPP adapter is loaded."""

    model: Any
    args: Any

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)  # type: ignore[misc]  # of TRL's trainer
        if self.is_world_process_zero():  # type: ignore[attr-defined]  # of Transformers'
            # TRL takes the adapter for a whole model of Transformers
            model, folder = cast(PeftModel, self.model), str(self.args.output_dir)
            config = cast(SPPConfig, model.peft_config["default"])
            _name_the_base(Path(folder) / CARD, str(config.base_model_name_or_path))
            model.create_or_update_model_card(folder)
            update_model_card(folder, config)


def carded(trainer_class: type) -> type:
    """One of TRL's trainers, with SPP's model card."""
    return type(trainer_class.__name__, (Carded, trainer_class), {})


def _name_the_base(path: Path, base: str) -> None:
    card = ModelCard.load(path)
    card.text = card.text.replace(_NO_BASE, f"`{base}`").replace(_NO_MODEL, f'model="{PLACEHOLDER}"')
    card.save(path)
