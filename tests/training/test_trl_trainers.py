# SPDX-License-Identifier: Apache-2.0
"""TRL's trainers with an SPP configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from trl import SFTConfig, SFTTrainer

from peft_spp.tuner import SPPLayer

from helpers.trl_cases import (
    TRAINERS,
    assert_equal,
    assert_zeros_kept,
    base_weights,
    factors,
    losses,
    make_dataset,
    make_trainer,
    pruned_model,
    slow,
    spp_config,
    tiny_tokenizer,
)


@pytest.mark.parametrize("kind", TRAINERS)
def test_trains_evaluates_and_resumes_to_the_same_losses(kind: str, tmp_path: Path) -> None:
    """One unbroken run of three steps, and one that starts again from the checkpoint after step 2."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    unbroken = make_trainer(kind, tmp_path, **saving)
    before, start = base_weights(unbroken.model), factors(unbroken.model)
    unbroken.train()
    assert all(not torch.equal(factor, start[name]) for name, factor in factors(unbroken.model).items())
    assert_zeros_kept(unbroken.model, before)

    resumed = make_trainer(kind, tmp_path, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == losses(unbroken) and len(losses(resumed)) == 3
    assert_equal(factors(resumed.model), factors(unbroken.model))
    torch.manual_seed(0)
    metrics = unbroken.evaluate()
    torch.manual_seed(0)
    assert resumed.evaluate()["eval_loss"] == metrics["eval_loss"]

    saved = PeftModel.from_pretrained(pruned_model(kind), str(tmp_path / "checkpoint-3"))
    assert_equal(factors(saved), factors(unbroken.model))


@pytest.mark.parametrize("kind", ["sft", "dpo", *(slow(kind) for kind in ("reward", "grpo", "kto"))])
def test_gradient_checkpointing_gives_the_same_training(kind: str, tmp_path: Path) -> None:
    plain = make_trainer(kind, tmp_path, max_steps=2)
    plain.train()
    checkpointed = make_trainer(kind, tmp_path, max_steps=2, gradient_checkpointing=True)
    checkpointed.train()
    assert losses(checkpointed) == losses(plain)
    assert_equal(factors(checkpointed.model), factors(plain.model))


@pytest.mark.slow
def test_reentrant_gradient_checkpointing_gives_the_same_training(tmp_path: Path) -> None:
    plain = make_trainer("sft", tmp_path, max_steps=2)
    plain.train()
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    checkpointed = make_trainer("sft", tmp_path, max_steps=2, **settings)
    checkpointed.train()
    assert losses(checkpointed) == losses(plain)
    assert_equal(factors(checkpointed.model), factors(plain.model))


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAINERS)
def test_autocast_to_bfloat16(kind: str, tmp_path: Path) -> None:
    """The trainers' default: float32 weights, bfloat16 arithmetic."""
    trainer = make_trainer(kind, tmp_path, bf16=True)
    before = base_weights(trainer.model)
    trainer.train()
    assert {factor.dtype for factor in factors(trainer.model).values()} == {torch.float32}
    assert_zeros_kept(trainer.model, before)
    in_float32 = make_trainer(kind, tmp_path)
    in_float32.train()
    if kind != "grpo":  # whose completions are drawn, so that a small difference becomes another text
        assert losses(trainer) == pytest.approx(losses(in_float32), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("autocast", [False, True])
def test_base_model_in_bfloat16(kind: str, autocast: bool, tmp_path: Path) -> None:
    trainer = make_trainer(kind, tmp_path, pruned_model(kind).to(torch.bfloat16), bf16=autocast)
    before = base_weights(trainer.model)
    assert {weight.dtype for weight in before.values()} == {torch.bfloat16}
    # PEFT keeps adapters of half-precision models in float32
    assert {factor.dtype for factor in factors(trainer.model).values()} == {torch.float32}
    trainer.train()
    assert_zeros_kept(trainer.model, before)


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packing(strategy: str, tmp_path: Path) -> None:
    trainer = make_trainer("sft", tmp_path, packing=True, packing_strategy=strategy, max_length=100, max_steps=2)
    assert len(trainer.train_dataset) < len(make_dataset("sft"))
    before = base_weights(trainer.model)
    trainer.train()
    assert_zeros_kept(trainer.model, before)


@pytest.mark.parametrize(
    "kind, greater_is_better",
    [
        ("sft", False),
        slow("dpo", True),
        slow("reward", False),
        slow("kto", False),
        slow("grpo", False),
        slow("grpo", True),
    ],
)
def test_load_best_model_at_end(kind: str, greater_is_better: bool, tmp_path: Path) -> None:
    """The rate is so large, or for DPO the order such, that an earlier checkpoint than the last is the best."""
    trainer = make_trainer(
        kind,
        tmp_path,
        learning_rate=3.0,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=greater_is_better,
    )
    trainer.train()
    best, last = trainer.state.best_model_checkpoint, str(tmp_path / "checkpoint-3")
    assert best not in (None, last)
    assert_equal(factors(trainer.model), factors(PeftModel.from_pretrained(pruned_model(kind), best)))
    of_last = factors(PeftModel.from_pretrained(pruned_model(kind), last))
    assert any(not torch.equal(factor, of_last[name]) for name, factor in factors(trainer.model).items())


def test_reward_model_trains_and_saves_its_score_head(tmp_path: Path) -> None:
    trainer = make_trainer("reward", tmp_path)
    untrained = trainer.model.get_base_model().score.original_module.weight.clone()
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    saved = PeftModel.from_pretrained(pruned_model("reward"), str(tmp_path / "adapter"))
    head = saved.get_base_model().score.modules_to_save["default"].weight
    assert torch.equal(head, trainer.model.get_base_model().score.modules_to_save["default"].weight)
    assert not torch.equal(head, untrained)


def test_an_adapter_on_the_head_is_refused_as_loras_is(tmp_path: Path) -> None:
    """TRL computes log-probabilities from `lm_head.weight` alone, so that the adapter would never be trained."""
    model = get_peft_model(pruned_model(), spp_config(target_modules=["lm_head", "q_proj"]))
    assert isinstance(model.get_output_embeddings(), SPPLayer)
    with pytest.raises(ValueError, match="lm_head"):
        make_trainer("sft", tmp_path, model)


def test_tokens_added_by_a_chat_template_are_trained(tmp_path: Path) -> None:
    """TRL asks for the rows of new tokens by `trainable_token_indices`, and for the head by `modules_to_save`."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "plain")
    with_template = type(tokenizer).from_pretrained(tmp_path / "plain")
    with_template.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    with_template.chat_template = (
        "{% for m in messages %}<|turn|>{{ m['role'] }} {{ m['content'] }}{{ eos_token }}{% endfor %}"
    )
    with_template.save_pretrained(tmp_path / "template")
    trainer = SFTTrainer(
        model=pruned_model(),
        args=SFTConfig(
            str(tmp_path / "out"),
            max_steps=2,
            learning_rate=2e-2,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            chat_template_path=str(tmp_path / "template"),
        ),
        train_dataset=make_dataset("sft").map(
            lambda row: {
                "messages": [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": row["text"]}]
            },
            remove_columns="text",
        ),
        processing_class=type(tokenizer).from_pretrained(tmp_path / "plain"),
        peft_config=spp_config(),
    )
    new_token = with_template.convert_tokens_to_ids("<|turn|>")
    config = trainer.model.peft_config["default"]
    assert new_token in config.trainable_token_indices["embed_tokens"] and "lm_head" in config.modules_to_save
    before = base_weights(trainer.model)
    trainer.train()
    assert_zeros_kept(trainer.model, before)
