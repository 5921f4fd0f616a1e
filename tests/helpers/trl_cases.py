# SPDX-License-Identifier: Apache-2.0
"""A trainer of each kind on a tiny pruned Llama, a tiny tokenizer and a few rows of text."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerFast, Trainer
from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from peft_spp import SPPConfig
from peft_spp.demo.data import train_tokenizer

from helpers.tiny import block_linears, is_positive_zero, prune_, tiny


TRAINERS: dict[str, tuple[type[Trainer], type]] = {
    "sft": (SFTTrainer, SFTConfig),
    "dpo": (DPOTrainer, DPOConfig),
    "reward": (RewardTrainer, RewardConfig),
    "grpo": (GRPOTrainer, GRPOConfig),
    "kto": (KTOTrainer, KTOConfig),
    "rloo": (RLOOTrainer, RLOOConfig),
    "distillation": (DistillationTrainer, DistillationConfig),
}
# those that compare the policy with a reference
WITH_REFERENCE = ("dpo", "grpo", "kto", "rloo")

# flags of the commands
ON_CPU = ("--use_cpu", "--bf16", "false", "--gradient_checkpointing", "false", "--dataloader_pin_memory", "false")
SMALL = (*ON_CPU, "--report_to", "none", "--disable_tqdm", "true", "--per_device_train_batch_size", "2")

_TOPICS = (
    "a zero stays a zero",
    "half of the rows are",
    "the sum of two",
    "a sparse matrix has",
    "we prune each layer",
)
TEXTS = [f"{topic} number {i}, and {topic[::-1]}." for i in range(4) for topic in _TOPICS]


@functools.lru_cache(maxsize=1)
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, vocab_size=280)


def pruned_model(kind: str = "sft", seed: int = 0, **settings: Any) -> nn.Module:
    """A tiny Llama whose blocks are 2:4 sparse, with -0.0 in none of the pruned places."""
    tokenizer = tiny_tokenizer()
    model = tiny(
        "LlamaForSequenceClassification" if kind == "reward" else "LlamaForCausalLM",
        seed,
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 128,
            "initializer_range": 0.2,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **({"num_labels": 1} if kind == "reward" else {}),
            **settings,
        },
    )
    for layer in block_linears(model).values():
        prune_(layer.weight, "2:4")
    return model


def spp_config(kind: str = "sft", **settings: Any) -> SPPConfig:
    return SPPConfig(
        **{"task_type": "SEQ_CLS" if kind == "reward" else "CAUSAL_LM", "r": 4, "spp_alpha": 8, **settings}
    )


def make_dataset(kind: str) -> Dataset:
    prompts, answers = [text[:12] for text in TEXTS], [text[12:] for text in TEXTS]
    if kind == "sft":
        return Dataset.from_dict({"text": TEXTS})
    if kind in ("dpo", "reward"):
        return Dataset.from_dict({"prompt": prompts, "chosen": answers, "rejected": answers[::-1]})
    if kind == "kto":
        return Dataset.from_dict({"prompt": prompts, "completion": answers, "label": [True, False] * 10})
    return Dataset.from_dict({"prompt": prompts})


def count_vowels(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward that depends on what was generated."""
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


SHORT_RUN: dict[str, Any] = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 2e-2,
    "lr_scheduler_type": "linear",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "seed": 3,
}
"""Settings of every trainer: on CPU in float32, three steps long."""


def make_trainer(kind: str, output_dir: Path, model: nn.Module | None = None, **settings: Any) -> Trainer:
    """A trainer on CPU in float32, three steps long; `settings` go to its configuration."""
    trainer_class, config_class = TRAINERS[kind]
    extra: dict[str, Any] = {}
    arguments = {**SHORT_RUN, "output_dir": str(output_dir)}
    if kind in ("grpo", "rloo"):
        arguments |= {"num_generations": 2, "max_completion_length": 6, "beta": 0.1}
        extra["reward_funcs"] = count_vowels
    elif kind == "distillation":
        arguments["max_completion_length"] = 6
        extra["teacher_model"] = pruned_model(seed=1)
    else:
        arguments["max_length"] = 32
    arguments |= settings
    if model is None:
        model = pruned_model(kind)
    if not isinstance(model, PeftModel):
        extra["peft_config"] = spp_config(kind)
    dataset = make_dataset(kind)
    return trainer_class(
        model=model,
        args=config_class(**arguments),
        train_dataset=dataset,
        eval_dataset=dataset.select(range(4)),
        processing_class=tiny_tokenizer(),
        **extra,
    )


def factors(model: nn.Module, adapter: str = "default") -> dict[str, torch.Tensor]:
    """Copies of an adapter's factors."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if f".{adapter}." in name and ".spp_" in name
    }


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the weights of the adapted layers."""
    return {name: layer.weight.detach().clone() for name, layer in block_linears(model).items()}


def assert_equal(tensors: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    """Both have the same names, and the same bits."""
    assert tensors.keys() == others.keys() and tensors
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name


def assert_zeros_kept(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    """Training did not touch the base, and every zero of it is +0.0 once the adapter is merged."""
    after = base_weights(model)
    assert_equal(before, after)
    model.merge_adapter()
    merged = base_weights(model)
    for name, weight in before.items():
        assert not torch.equal(merged[name], weight), f"{name} was not trained"
        assert is_positive_zero(merged[name][weight == 0]).all(), name
    model.unmerge_adapter()
    assert_equal(before, base_weights(model))


def slow(*values: Any) -> Any:
    """Parameters of a test that only runs with `-m slow`."""
    return pytest.param(*values, marks=pytest.mark.slow)


def losses(trainer: Trainer) -> dict[int, float]:
    """The training loss of each step."""
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
