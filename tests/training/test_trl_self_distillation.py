# SPDX-License-Identifier: Apache-2.0
"""TRL's trainers that distill a model into itself: with the adapter on, or off, as the teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import Trainer
from trl.experimental.sdft import SDFTConfig, SDFTTrainer
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

from peft_spp import SPPLayer

from helpers.trl_cases import (
    SHORT_RUN,
    TEXTS,
    assert_zeros_kept,
    base_weights,
    count_vowels,
    factors,
    losses,
    pruned_model,
    spp_config,
    tiny_tokenizer,
)


TRAINERS = {"sdft": (SDFTTrainer, SDFTConfig), "sdpo": (SDPOTrainer, SDPOConfig)}


def make_trainer(kind: str, teacher: str, folder: Path) -> Trainer:
    trainer_class, config_class = TRAINERS[kind]
    arguments = {
        **SHORT_RUN,
        "output_dir": str(folder),
        "teacher_model_kind": teacher,
        "num_generations": 2,
        "max_completion_length": 6,
    }
    rows = {"prompt": [text[:12] for text in TEXTS], "privileged_context": TEXTS}
    more = {"reward_funcs": count_vowels} if kind == "sdpo" else {}
    return trainer_class(
        model=pruned_model(),
        args=config_class(**arguments),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tiny_tokenizer(),
        peft_config=spp_config(),
        **more,
    )


@pytest.mark.parametrize("teacher", ["live", "base"])
@pytest.mark.parametrize("kind", TRAINERS)
def test_a_model_is_its_own_teacher(tmp_path: Path, kind: str, teacher: str) -> None:
    trainer = make_trainer(kind, teacher, tmp_path)
    layer = next(module for module in trainer.model.modules() if isinstance(module, SPPLayer))
    disabled: set[bool] = set()
    trainer.model.register_forward_hook(lambda *_: disabled.add(layer.disable_adapters))
    weights, before = base_weights(trainer.model), factors(trainer.model)
    trainer.train()
    after = factors(trainer.model)
    assert any(not torch.equal(after[name], one) for name, one in before.items())
    assert all(torch.isfinite(torch.tensor(loss)) for loss in losses(trainer))
    assert_zeros_kept(trainer.model, weights)
    # SDPO's tiny model earns no reward to learn from here, so its teacher may not be asked
    if kind == "sdft":
        assert (True in disabled) is (teacher == "base")


@pytest.mark.parametrize("kind", TRAINERS)
def test_an_averaged_teacher_is_refused_by_trl(tmp_path: Path, kind: str) -> None:
    """When this fails, docs/training.md may say that it works."""
    with pytest.raises(ValueError, match="non-pure-LoRA PEFT model is not supported"):
        make_trainer(kind, "ema", tmp_path)
