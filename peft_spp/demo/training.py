# SPDX-License-Identifier: Apache-2.0
"""The demo's training runs, with `transformers.Trainer` and TRL's `SFTTrainer`."""

from pathlib import Path
from typing import Any

from datasets import Dataset  # type: ignore[import-untyped]
from peft import PeftConfig
from rich.progress import Progress
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from .config import DemoConfig
from .display import add_bar


class ProgressCallback(TrainerCallback):
    """Shows a training run as a bar."""

    def __init__(self, progress: Progress, description: str) -> None:
        self._progress = progress
        self._task = add_bar(progress, description, total=None)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._progress.update(self._task, total=state.max_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._progress.update(self._task, completed=state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        loss = kwargs["logs"].get("loss")
        if loss is not None:
            self._progress.update(self._task, note=f"loss {float(loss):.3f}")


def train_dense(
    config: DemoConfig,
    tokenizer: PreTrainedTokenizerFast,
    dataset: Dataset,
    output_dir: Path,
    callback: ProgressCallback,
) -> PreTrainedModel:
    """Train a small Llama from scratch."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=config.block_size,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    trainer = Trainer(
        model,
        TrainingArguments(
            **_common_arguments(config, output_dir),
            max_steps=config.dense_steps,
            learning_rate=config.dense_learning_rate,
            weight_decay=0.1,
        ),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        train_dataset=dataset,
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return model


def fine_tune(
    config: DemoConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    dataset: Dataset,
    peft_config: PeftConfig,
    learning_rate: float,
    adapter_dir: Path,
    callback: ProgressCallback,
) -> None:
    trainer = SFTTrainer(
        model,
        SFTConfig(
            **_common_arguments(config, adapter_dir),
            max_steps=config.tuning_steps,
            learning_rate=learning_rate,
            max_length=config.block_size,
            gradient_checkpointing=False,
            bf16=False,
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()


def _common_arguments(config: DemoConfig, output_dir: Path) -> dict[str, Any]:
    return {
        "output_dir": str(output_dir),
        "seed": config.seed,
        "per_device_train_batch_size": config.batch_size,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,  # as a fraction of all steps
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        # The demo shows progress itself.
        "disable_tqdm": True,
    }
