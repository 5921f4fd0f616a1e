# SPDX-License-Identifier: Apache-2.0
"""`peft-spp sft` goes on from a checkpoint: with the same settings, and no step too many."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_spp import SPPConfig
from peft_spp.sft.run import main

from helpers.sft_cases import refusal
from helpers.trl_cases import (
    SMALL,
    assert_equal,
)


@pytest.mark.parametrize(
    "changed, shown",
    [
        (["--spp_r", "2"], "--spp_r 4, and this run 2"),
        (["--spp_alpha", "8"], "--spp_alpha 32, and this run 8.0"),
        (["--spp_bias", "all"], "--spp_bias none, and this run all"),
    ],
)
def test_a_run_does_not_go_on_with_other_settings(
    changed: list[str], shown: str, base: str, data: str, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "out" / "checkpoint-1"
    config = SPPConfig(task_type="CAUSAL_LM", r=4, target_modules=["down_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(checkpoint)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 1}')
    arguments = ["--model_name_or_path", base, "--dataset_name", data, *SMALL, "--output_dir", str(tmp_path / "out")]
    arguments += ["--spp_r", "4", "--spp_target_modules", "down_proj", "--resume_from_checkpoint", "true"]
    main([*arguments, "--dry-run"])
    assert shown in refusal(*arguments, *changed, "--dry-run")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_finished_run_that_is_started_again_makes_no_step_more(
    streamed: bool, base: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after a preemption between the last checkpoint and the end: Transformers alone trains a third step."""
    out = tmp_path / "out"
    arguments = ["--model_name_or_path", base, "--dataset_name", data, *SMALL, "--output_dir", str(out)]
    arguments += ["--max_steps", "2", "--learning_rate", "1e-2", "--resume_from_checkpoint", "auto"]
    arguments += ["--dataset_streaming"] * streamed
    main(arguments)
    written = load_file(out / "adapter_model.safetensors")
    (out / "adapter_model.safetensors").unlink()
    main(arguments)
    assert_equal(load_file(out / "adapter_model.safetensors"), written)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-2"]
    assert "The checkpoint has all 2 steps" in capsys.readouterr().err


def test_a_finished_run_that_is_started_again_keeps_the_best_adapter(base: str, data: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--model_name_or_path", base, "--dataset_name", data, *SMALL, "--output_dir", str(out)]
    arguments += ["--max_steps", "2", "--save_steps", "1", "--eval_steps", "1", "--eval_strategy", "steps"]
    # the best is the one of the highest loss, so it is not the last
    arguments += ["--dataset_test_split", "train", "--load_best_model_at_end", "--greater_is_better", "true"]
    arguments += ["--learning_rate", "1e-1", "--lr_scheduler_type", "constant", "--resume_from_checkpoint", "auto"]
    for _ in range(2):
        main(arguments)
        saved = load_file(out / "adapter_model.safetensors")
        assert_equal(saved, load_file(out / "checkpoint-1" / "adapter_model.safetensors"))
        (out / "adapter_model.safetensors").unlink()


def test_a_resumed_run_names_the_rate_that_it_keeps(
    base: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["--model_name_or_path", base, "--dataset_name", data, *SMALL, "--output_dir", str(out)]
    arguments += ["--logging_steps", "1", "--lr_scheduler_type", "constant"]
    main([*arguments, "--max_steps", "1", "--learning_rate", "1e-2"])
    capsys.readouterr()
    arguments += ["--max_steps", "2", "--resume_from_checkpoint", "true"]
    main([*arguments, "--learning_rate", "1e-1"])
    shown = capsys.readouterr().err
    assert "Rate:       0.01\n" in shown and "--learning_rate 0.1 has no effect" in shown
    history = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert [entry["learning_rate"] for entry in history if "learning_rate" in entry] == [0.01, 0.01]
    main([*arguments, "--learning_rate", "1e-2", "--dry_run"])
    assert "no effect" not in capsys.readouterr().err
