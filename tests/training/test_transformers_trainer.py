# SPDX-License-Identifier: Apache-2.0
"""Transformers' own `Trainer`, without TRL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments
from trl_cases import (
    TEXTS,
    assert_equal,
    assert_zeros_kept,
    base_weights,
    factors,
    losses,
    pruned_model,
    spp_config,
    tiny_tokenizer,
)


def make_plain_trainer(output_dir: Path, **settings: Any) -> Trainer:
    """A `Trainer` of an SPP model with dropout, so that a resumed run depends on the states of random generators."""
    torch.manual_seed(2)
    model = get_peft_model(pruned_model(), spp_config(spp_dropout=0.1))
    tokenizer = tiny_tokenizer()
    dataset = Dataset.from_dict({"input_ids": [tokenizer(text)["input_ids"] for text in TEXTS]})
    arguments = {
        "output_dir": str(output_dir),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 2e-2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    } | settings
    return Trainer(
        model,
        TrainingArguments(**arguments),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        train_dataset=dataset,
        eval_dataset=dataset.select(range(4)),
    )


def test_trains_saves_and_resumes(tmp_path: Path) -> None:
    unbroken = make_plain_trainer(tmp_path)
    before = base_weights(unbroken.model)
    unbroken.train()
    assert_zeros_kept(unbroken.model, before)
    unbroken.save_model(str(tmp_path / "adapter"))
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names and "model.safetensors" not in names
    assert_equal(
        factors(PeftModel.from_pretrained(pruned_model(), str(tmp_path / "adapter"))), factors(unbroken.model)
    )

    resumed = make_plain_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == losses(unbroken) and len(losses(resumed)) == 4
    assert_equal(factors(resumed.model), factors(unbroken.model))


def test_load_best_model_at_end(tmp_path: Path) -> None:
    trainer = make_plain_trainer(
        tmp_path,
        learning_rate=3.0,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    evaluations = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = min(evaluations, key=lambda step: evaluations[step])
    assert best < 4, "the rate should be so large that the last step is not the best"
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluations[best], abs=1e-6)
    assert trainer.model.active_adapters == ["default"]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"bf16": True}, {"gradient_checkpointing": True}])
def test_mixed_precision_and_gradient_checkpointing(settings: dict[str, Any], tmp_path: Path) -> None:
    trainer = make_plain_trainer(tmp_path, **settings)
    before = base_weights(trainer.model)
    trainer.train()
    assert_zeros_kept(trainer.model, before)
