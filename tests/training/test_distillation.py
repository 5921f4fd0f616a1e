# SPDX-License-Identifier: Apache-2.0
"""`peft-spp sft` with a teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from peft_spp.sft.errors import InputError
from peft_spp.sft.run import main
from peft_spp.sft.teacher import TOKENS_AT_ONCE, DistillationSFTTrainer, divergence

from helpers.trl_cases import (
    ON_CPU,
    TEXTS,
    assert_zeros_kept,
    base_weights,
    factors,
    pruned_model,
    spp_config,
    tiny_tokenizer,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A pruned model, a dense one as its teacher, and a file of texts."""
    root = tmp_path_factory.mktemp("models")
    for name, model in (("pruned", pruned_model()), ("dense", pruned_model(seed=1))):
        model.save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return {name: str(root / name) for name in ("pruned", "dense", "texts.jsonl")}


def arguments(folders: dict[str, str], out: Path, *extra: str) -> list[str]:
    files = ["--model_name_or_path", folders["pruned"], "--dataset_name", folders["texts.jsonl"]]
    return [*files, "--output_dir", str(out), *ON_CPU, "--report_to", "none", *extra]


def reference(model: Any, teacher: Any, ids: torch.Tensor, learned: torch.Tensor) -> torch.Tensor:
    """The mean of the divergence over labeled tokens, by the formula in float64."""
    with torch.no_grad():
        p = teacher(input_ids=ids).logits.double().softmax(-1)[:, :-1]
        q = model(input_ids=ids).logits.double().softmax(-1)[:, :-1]
    each = (p * (p.log() - q.log())).sum(-1)
    return each[learned[:, 1:]].mean()


@pytest.mark.parametrize("tokens", [0, 1, TOKENS_AT_ONCE, 2 * TOKENS_AT_ONCE + 3])
def test_the_divergence_and_its_gradient_are_those_of_the_formula(tokens: int) -> None:
    torch.manual_seed(0)
    scores, wanted = torch.randn(tokens, 7, requires_grad=True), torch.randn(tokens, 7)
    total = divergence(scores, wanted)
    total.backward()
    p, q = wanted.double().softmax(-1), scores.detach().double().softmax(-1)
    expected = (p * (p.log() - q.log())).sum()
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scores.grad.double(), q - p, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"completion_only_loss": True}, {"packing": True, "max_length": 16}])
def test_the_loss_is_the_mean_over_the_tokens_with_a_label(settings: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"text": text} for text in TEXTS]
    if "completion_only_loss" in settings:
        rows = [{"prompt": text[:9], "completion": text[9:]} for text in TEXTS]
    teacher = pruned_model(seed=1)
    trainer = DistillationSFTTrainer(
        model=pruned_model(),
        teacher=teacher,
        args=SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        peft_config=spp_config(),
    )
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if ".spp_B." in name:
                parameter.normal_()
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    if "packing" not in settings:
        expected = reference(trainer.model, teacher, batch["input_ids"], batch["labels"] != -100)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)
    assert loss > 0
    # sums over more tokens than this batch has, as when gradients are accumulated
    twice = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(10**6))
    assert 0 < twice < loss
    assert all(not parameter.requires_grad for parameter in teacher.parameters())


def test_a_run_comes_nearer_to_the_teacher_and_keeps_the_zeros(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    fast = ("--learning_rate", "5e-2", "--max_steps", "30", "--lr_scheduler_type", "constant", "--logging_steps", "5")
    main(arguments(folders, out, *fast, "--teacher_model_name_or_path", folders["dense"]))
    assert f"Teacher:    {folders['dense']}" in capsys.readouterr().err
    base = AutoModelForCausalLM.from_pretrained(folders["pruned"])
    teacher = AutoModelForCausalLM.from_pretrained(folders["dense"])
    ids = tiny_tokenizer()(TEXTS[0], return_tensors="pt")["input_ids"]
    learned = torch.ones_like(ids, dtype=torch.bool)
    before = reference(base, teacher, ids, learned)
    trained = PeftModel.from_pretrained(base, str(out))
    assert reference(trained, teacher, ids, learned) < 0.9 * before
    assert any(factor.any() for factor in factors(trained).values())
    assert_zeros_kept(trained, base_weights(trained))


def test_a_teacher_equal_to_the_model_leaves_nothing_to_learn(folders: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    main(arguments(folders, out, "--max_steps", "2", "--teacher_model_name_or_path", folders["pruned"]))
    trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders["pruned"]), str(out))
    changes = [factor.abs().max() for name, factor in factors(trained).items() if "spp_B" in name]
    # AdamW turns the rounding of a gradient that is zero into steps of the learning rate, so that is the bound
    assert changes and max(changes) <= 2.01 * SFTConfig(str(out), use_cpu=True, bf16=False).learning_rate


@pytest.mark.parametrize("dry", [[], ["--dry_run"]])
@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--teacher_model_name_or_path", "{missing}"], "teacher .* cannot be loaded"),
        (["--teacher_model_name_or_path", "{other}"], "predicts 99 tokens and the model"),
        (["--teacher_model_name_or_path", "{dense}", "--label_smoothing_factor", "0.1"], "label_smoothing_factor"),
        (["--teacher_model_name_or_path", "{dense}", "--loss_type", "dft"], "loss_type"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused_before_training(
    extra: list[str], said: str, dry: list[str], folders: dict[str, str], tmp_path: Path
) -> None:
    pruned_model(vocab_size=99).save_pretrained(tmp_path / "other")
    places = {"missing": tmp_path / "missing", "other": tmp_path / "other", "dense": folders["dense"]}
    words = [word.format(**places) for word in extra]
    with pytest.raises(InputError, match=said):
        main(arguments(folders, tmp_path / "out", *words, *dry))
    assert not (tmp_path / "out").exists()
