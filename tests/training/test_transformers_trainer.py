# SPDX-License-Identifier: Apache-2.0
"""Transformers' own `Trainer`, without TRL."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from helpers.trl_cases import (
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


WEIGHTS, CONFIG, MASKS = "adapter_model.safetensors", "adapter_config.json", "base_masks.json"


def truncate(name: str, to: int | None = -9) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:to])


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            metadata = file.metadata()
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata=metadata)

    return edit


def edit_config(**changes: Any) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | changes))

    return edit


def cut_a_row(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if "up_proj.spp_A" in name)
    tensors[name] = tensors[name][:-1].contiguous()


def put_nan(tensors: dict[str, torch.Tensor]) -> None:
    next(tensor for name, tensor in tensors.items() if "up_proj" in name).view(-1)[5] = float("nan")


def pickle_of(content: bytes) -> Callable[[Path], object]:
    return lambda folder: ((folder / "adapter_model.bin").write_bytes(content), (folder / WEIGHTS).unlink())


# what is done to the checkpoint, and a part of the message
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated weights": (truncate(WEIGHTS), f"{WEIGHTS} cannot be read"),
    "a truncated header": (truncate(WEIGHTS, to=30), f"{WEIGHTS} cannot be read"),
    "empty weights": (truncate(WEIGHTS, to=0), f"{WEIGHTS} cannot be read"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "Can't find a valid checkpoint at .*checkpoint-2"),
    "no settings": (lambda folder: (folder / CONFIG).unlink(), f"checkpoint-2 has no {CONFIG}"),
    "empty settings": (truncate(CONFIG, to=0), f"{CONFIG} is not valid JSON"),
    "truncated settings": (truncate(CONFIG), f"{CONFIG} is not valid JSON"),
    "a truncated record": (truncate(MASKS), f"{MASKS} is not valid JSON"),
    "an empty record": (lambda folder: (folder / MASKS).write_text("{}"), f"{MASKS} is damaged"),
    "another method's settings": (edit_config(peft_type="LORA"), "peft_type 'LORA', but adapter 'default'"),
    "another rank": (edit_config(r=5), "4 rows, but 5 in the adapter's settings"),
    "another scaling": (edit_config(spp_alpha=3.0), "different settings than adapter 'default'"),
    "a factor of another shape": (edit_tensors(cut_a_row), "up_proj' has 3 rows"),
    "a factor too few": (edit_tensors(lambda tensors: tensors.popitem()), "only half of the adapter"),
    "a value that is NaN": (edit_tensors(put_nan), "up_proj.*NaN"),
    "a damaged pickle": (pickle_of(b"junk"), "adapter_model.bin cannot be read"),
    "an empty pickle": (pickle_of(b""), "adapter_model.bin cannot be read"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    trainer = make_plain_trainer(tmp_path_factory.mktemp("run"), max_steps=2)
    trainer.train()
    return Path(trainer.args.output_dir) / "checkpoint-2"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_not_resumed_from(checkpoint: Path, tmp_path: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(checkpoint, folder)
    change(folder)
    trainer = make_plain_trainer(tmp_path / "out")
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(folder))
    assert_equal(trainer.model.state_dict(), before)
    assert trainer.state.global_step == 0


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
