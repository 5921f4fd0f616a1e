# SPDX-License-Identifier: Apache-2.0
"""`peft-spp dpo`, `reward`, `kto`, `grpo` and `rloo`, with TRL's own trainers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest
import trl
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from typer.main import get_command
from typer.testing import CliRunner

import peft_spp.__main__
import peft_spp.sft.run as sft_run
from peft_spp.cli import app
from peft_spp.sft import last_complete_checkpoint
from peft_spp.sft.arguments import parse_arguments
from peft_spp.sft.errors import InputError
from peft_spp.sft.methods import METHODS, load
from peft_spp.sft.run import main

from helpers.trl_cases import (
    SMALL,
    TEXTS,
    TRAINERS,
    assert_equal,
    assert_zeros_kept,
    base_weights,
    factors,
    make_dataset,
    slow,
)


ROOT = Path(__file__).parents[2]
NEW = [name for name in METHODS if name != "sft"]
REWARDS = """
def vowels(completions, **kwargs):
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]

def nearness(completions, answer, log_metric, weight=1.0, **kwargs):
    return [float(text == right) for text, right in zip(completions, answer)]

not_a_function = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with reward functions, and what each method trains on."""
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    for kind in METHODS:
        write(tmp_path / f"{kind}.jsonl", list(make_dataset(kind)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    return tmp_path


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def arguments(kind: str, base: str, *extra: str) -> list[str]:
    """A run of three steps; what comes later on a command line overrides it."""
    words = ["--model_name_or_path", base, "--dataset_name", f"{kind}.jsonl", "--output_dir", "out", *SMALL]
    words += ["--max_steps", "3", "--learning_rate", "2e-2", "--save_steps", "1", "--logging_steps", "1"]
    if kind in ("grpo", "rloo"):
        words += ["--num_generations", "2", "--max_completion_length", "6", "--beta", "0.1"]
        words += ["--reward_funcs", "my_rewards.vowels"]
    elif kind != "sft":
        words += ["--max_length", "32"]
    return [*words, *extra]


def trained(kind: str, base: str, out: str = "out") -> PeftModel:
    """The saved adapter on its base model."""
    if kind == "reward":
        return PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base, num_labels=1), out)
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out)


def test_the_table_names_what_trl_has() -> None:
    assert METHODS.keys() == TRAINERS.keys() - {"distillation"}
    for name, method in METHODS.items():
        assert (load(method.trainer), load(method.config)) == TRAINERS[name]
        assert issubclass(load(method.script), trl.ScriptArguments)


@pytest.mark.parametrize("kind", NEW)
def test_trains_and_resumes_to_the_same_adapter(
    kind: str, base: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(arguments(kind, base), kind)
    assert "Base:       2:4, 50 % zero" in capsys.readouterr().err
    model = trained(kind, base)
    expected = factors(model)
    assert model.peft_config["default"].task_type == METHODS[kind].task_type
    assert any(factor.any() for name, factor in expected.items() if ".spp_B." in name)
    assert_zeros_kept(model, base_weights(model))
    card = (folder / "out" / "README.md").read_text()
    assert card.count("import peft_spp") == 1 and "None" not in card
    assert f"fine-tuned version of `{base}`" in card and "library_name: peft" in card

    # as if killed while the last checkpoint was written
    (folder / "out" / "checkpoint-3" / "trainer_state.json").unlink()
    main(arguments(kind, base, "--resume_from_checkpoint", "auto"), kind)
    assert "Checkpoint: out/checkpoint-2" in capsys.readouterr().err
    assert_equal(factors(trained(kind, base)), expected)
    resumed = last_complete_checkpoint("out")
    assert resumed is not None and resumed.endswith("checkpoint-3")


def test_a_trained_reward_model_gives_the_rewards(base: str, folder: Path) -> None:
    """The adapter as it was saved: Transformers loads it with its head."""
    main(arguments("reward", base, "--output_dir", "scorer", "--max_steps", "1"), "reward")
    words = arguments("grpo", base, "--reward_model_name_or_path", "scorer", "--max_steps", "1")
    main(words, "grpo")
    (entry, *_) = json.loads(Path("out/checkpoint-1/trainer_state.json").read_text())["log_history"]
    names = {name for name in entry if re.fullmatch(r"rewards/.*/mean", name)}
    assert len(names) == 2 and "rewards/vowels/mean" in names
    main([*words, "--dry_run"], "grpo")


REFUSED = [
    (kind, ["--dataset_name", "sft.jsonl"], f"columns 'text'. Training needs .*{column}")
    for kind, column in zip(NEW, ("'chosen'", "'rejected'", "'label'", "'prompt'", "'prompt'"), strict=True)
]
REFUSED += [
    (kind, ["--use_peft", "--lora_r", "4"], f"--use_peft, --lora_r: only .*`trl {kind}`") for kind in ("dpo", "rloo")
]
REFUSED += [
    ("dpo", ["--dataset_name", "holes.jsonl"], "Row 2 .*'rejected' that is null.*needs text"),
    ("dpo", ["--dataset_name", "chat.jsonl"], "no chat template. Save the tokenizer with one"),
    ("reward", ["--dataset_name", "chat.jsonl"], "no chat template. Pass --chat_template_path"),
    ("kto", ["--dataset_name", "words.jsonl"], "Row 1 .*'label' that is of type str.*true or false"),
    ("kto", ["--max_length", "1"], "No rows .*--max_length"),
    ("dpo", ["--f_divergence_type", "js_divergence", "--loss_type", "apo_zero"], "f_divergence_type"),
    ("dpo", ["--lerning_rate", "1"], "--learning_rate.*`peft-spp dpo --help`"),
    ("dpo", ["--resume_from_checkpoint", "true"], "no complete checkpoint"),
    ("reward", ["--model_name_or_path", "./absent"], "no folder './absent'"),
    ("reward", ["--teacher_model_name_or_path", "x"], "unknown flag --teacher_model_name_or_path"),
    ("grpo", ["--reward_funcs", "vowels"], "no reward function 'vowels'"),
    ("grpo", ["--reward_funcs", "my_rewards.absent"], "'my_rewards.absent' cannot be imported"),
    ("rloo", ["--reward_funcs", "absent.vowels"], "'absent.vowels' cannot be imported"),
    ("grpo", ["--reward_funcs", "my_rewards.not_a_function"], "is a int, which cannot be called"),
    ("grpo", ["--reward_funcs", "my_rewards.nearness"], "'my_rewards.nearness' takes 'answer'"),
    ("grpo", ["--reward_funcs", "think_format_reward"], "is for conversations"),
    ("grpo", ["--reward_weights", "1", "2"], "reward weights"),
    ("grpo", ["--reward_model_name_or_path", "./absent"], "reward model './absent' cannot be loaded"),
    ("rloo", ["--reward_model_name_or_path", "{base}"], "would be random.*`peft-spp reward`"),
    ("grpo", ["--per_device_train_batch_size", "3"], "divisible by"),
]


@pytest.mark.parametrize(("kind", "extra", "said"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_used_is_refused_before_the_model_is_loaded(
    kind: str, extra: list[str], said: str, base: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sft_run, "train", lambda run: pytest.fail("it was trained"))
    rows = list(make_dataset("dpo"))
    write(folder / "holes.jsonl", [rows[0], {**rows[1], "rejected": None}, *rows[2:]])
    write(folder / "chat.jsonl", [{name: [{"role": "user", "content": "a"}] for name in ("chosen", "rejected")}])
    write(folder / "words.jsonl", [{**row, "label": "good"} for row in make_dataset("kto")])
    extra = [word.format(base=base) for word in extra]
    for dry in ([], ["--dry_run"]):
        with pytest.raises(InputError) as error:
            main(arguments(kind, base, *extra, *dry), kind)
        assert re.search(said, str(error.value)), error.value
    assert not Path("out").exists()


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_a_reward_is_wanted(kind: str, base: str, folder: Path) -> None:
    words = arguments(kind, base)
    with pytest.raises(InputError, match=r"needs a reward\. Pass --reward_funcs"):
        main(words[: words.index("--reward_funcs")], kind)


def test_a_reward_that_needs_a_package_says_how_to_install_it(
    base: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_spp.sft.rewards.find_spec", lambda name: None)
    with pytest.raises(InputError, match="'accuracy_reward' needs math-verify: pip install math-verify"):
        main(arguments("grpo", base, "--reward_funcs", "accuracy_reward"), "grpo")
    with pytest.raises(InputError, match="--use_vllm needs the package vllm"):
        main(arguments("grpo", base, "--use_vllm"), "grpo")


def test_a_reward_function_gets_the_columns_that_it_takes(base: str, folder: Path) -> None:
    write(folder / "grpo.jsonl", [{"prompt": text[:9], "answer": text[9:]} for text in TEXTS])
    words = arguments("grpo", base, "--reward_funcs", "my_rewards.nearness", "get_soft_overlong_punishment")
    main([*words, "--max_steps", "1"], "grpo")
    (entry, *_) = json.loads(Path("out/checkpoint-1/trainer_state.json").read_text())["log_history"]
    assert entry["rewards/nearness/mean"] == 0 and entry["rewards/soft_overlong_punishment_reward/mean"] == 0


@pytest.mark.parametrize("kind", NEW)
def test_a_dry_run_writes_nothing(kind: str, base: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if "__pycache__" not in path.parts}
    extra = [
        "--spp_r",
        "2",
        "--spp_target_modules",
        "down_proj",
        "--eval_strategy",
        "epoch",
        "--test_split_size",
        "0.2",
    ]
    main(arguments(kind, base, *extra, "--per_device_eval_batch_size", "2", "--dry_run"), kind)
    shown = capsys.readouterr().err
    # two blocks with a down_proj of 16 rows and 24 inputs; a reward model has a head of 16 inputs
    count = 2 * (2 * 24 + 16) + (16 if kind == "reward" else 0)
    assert f"SPP on 2 layers, {count} trainable parameters" in shown and "Data:       16 rows" in shown
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if "__pycache__" not in path.parts}
    assert after == before


@pytest.mark.parametrize("kind", METHODS)
def test_the_learning_rate_is_told_and_that_trls_default_is_too_low(
    kind: str, base: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    default = f"{load(METHODS[kind].config)(output_dir='out', bf16=False).learning_rate:g}"
    main(arguments(kind, base, "--learning_rate", default, "--dry_run"), kind)
    start = "0.004" if kind == "sft" else "0.001"
    shown = capsys.readouterr().err
    assert f"{default} (TRL's default is {default})" in shown and f"--learning_rate, {start} to start from." in shown
    main(arguments(kind, base, "--learning_rate", start, "--dry_run"), kind)
    shown = capsys.readouterr().err
    assert f"\nRate:       {start}\n" in shown and "--learning_rate" not in shown


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("dpo", [{"chosen": text, "rejected": text[:5] + text[9:]} for text in TEXTS]),
        ("kto", list(make_dataset("dpo"))),
        ("kto", [{**row, "label": int(row["label"])} for row in make_dataset("kto")]),
        ("reward", [{"chosen_ids": [5, 6, 7], "rejected_ids": [5, 8]}] * 4),
    ],
)
def test_other_columns_that_trl_takes(kind: str, rows: list[dict[str, Any]], base: str, folder: Path) -> None:
    write(folder / f"{kind}.jsonl", rows)
    main(arguments(kind, base, "--dry_run"), kind)


@pytest.mark.parametrize("kind", METHODS)
def test_the_flags_that_help_shows_are_those_of_the_parser(kind: str) -> None:
    command = get_command(app).commands[kind]  # type: ignore[attr-defined]
    shown = command.get_params(command.make_context(kind, [], resilient_parsing=True))
    names = {name for one in shown for name in one.opts} - {"--help", "--help-all", "--config"}
    assert len(names) > 20
    result = CliRunner().invoke(app, [kind, "--help-all"])
    assert result.exit_code == 0 and names <= set(re.findall(r"--\w+", result.output))


@pytest.mark.parametrize("kind", METHODS)
def test_the_page_of_the_command_line_names_the_classes_of_the_flags(kind: str) -> None:
    rows = [line.split(" | ") for line in (ROOT / "docs/reference/cli.md").read_text().splitlines() if "](" in line]
    named = {row[2].split("`")[1] for row in rows if row[0] in ("| all that train", f"| `{kind}`")}
    parsed = parse_arguments(["--model_name_or_path", "m", "--dataset_name", "d", "--use_cpu"], METHODS[kind])
    classes = {cls for one in parsed[1:-1] for cls in type(one).__mro__ if is_dataclass(cls)}
    assert named == {cls.__name__ for cls in classes if not cls.__name__.startswith("_")}


def test_python_m_peft_spp_runs_them(
    base: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that launchers of modules can."""
    monkeypatch.setattr(sys, "argv", ["peft_spp", "dpo", *arguments("dpo", base, "--dry_run")])
    with pytest.raises(SystemExit) as ended:
        peft_spp.__main__.main()
    assert not ended.value.code and "SPP on 14 layers" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_launched_processes_train_and_save_one_adapter(kind: str, base: str, folder: Path) -> None:
    # the launcher of several processes on one machine is named for GPUs, and serves CPUs as well
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    completed = subprocess.run(
        [*launch, "-m", "peft_spp", kind, *arguments(kind, base)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert completed.returncode == 0, completed.stderr[-3000:]
    assert completed.stderr.count("Adapter:") == 1  # from the first process alone
    assert Path("out/checkpoint-3/rng_state_1.pth").is_file()
    assert_zeros_kept(model := trained(kind, base), base_weights(model))


@pytest.mark.parametrize("kind", [slow(kind) for kind in NEW])
def test_streamed_data_and_evaluation(kind: str, base: str, folder: Path) -> None:
    data = folder / "split"
    data.mkdir()
    for split in ("train", "test"):
        write(data / f"{split}.jsonl", list(Dataset.from_list(list(make_dataset(kind))).select(range(8))))
    extra = ["--dataset_name", str(data), "--eval_strategy", "steps", "--eval_steps", "1", "--max_steps", "2"]
    main(arguments(kind, base, *extra, "--per_device_eval_batch_size", "2"), kind)
    history = json.loads(Path("out/checkpoint-2/trainer_state.json").read_text())["log_history"]
    assert any("eval_loss" in entry for entry in history)
    main(arguments(kind, base, "--dataset_streaming", "--max_steps", "2", "--output_dir", "streamed"), kind)
    assert_zeros_kept(model := trained(kind, base, "streamed"), base_weights(model))
