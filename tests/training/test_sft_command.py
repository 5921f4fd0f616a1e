# SPDX-License-Identifier: Apache-2.0
"""`peft-spp sft`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer
from typer.testing import CliRunner

import peft_spp
from peft_spp.cli import app
from peft_spp.installing import how_to_install
from peft_spp.sft import last_complete_checkpoint
from peft_spp.sft.run import main
from peft_spp.sft.trainer import carded

from helpers.sft_cases import ROWS, refusal, write_jsonl
from helpers.trl_cases import (
    ON_CPU,
    SMALL,
    assert_equal,
    assert_zeros_kept,
    base_weights,
    factors,
    pruned_model,
    spp_config,
    tiny_tokenizer,
)


def test_help_shows_the_flags_of_trl_and_of_spp() -> None:
    common = ["--model_name_or_path", "--packing", "--dataset_name", "--spp_r", "--spp_alpha", "--config", "--dry_run"]
    for arguments, flags in ((["--help"], common), (["--help-all"], [*common, "--neftune_noise_alpha"])):
        result = CliRunner().invoke(app, ["sft", *arguments], env={"COLUMNS": "120"})
        assert result.exit_code == 0
        assert [flag for flag in flags if flag not in result.output] == []


def test_trains_from_yaml_and_command_line_and_resumes(base: str, data: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "model_name_or_path": base,
                "dataset_name": data,
                "learning_rate": 2e-2,
                "max_steps": 4,
                "save_steps": 2,
                "spp_r": 2,
                "spp_alpha": 6,
                "spp_target_modules": ["q_proj", "down_proj"],
            }
        )
    )
    out = tmp_path / "out"
    arguments = ["sft", f"--config={config}", *SMALL, "--output_dir", str(out), "--spp_r", "4"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(out))
    settings = trained.peft_config["default"]
    # the command line goes before the file
    assert (settings.r, settings.spp_alpha, settings.target_modules) == (4, 6, {"q_proj", "down_proj"})
    assert settings.base_model_name_or_path == base
    merged = trained.merge_and_unload(safe_merge=True)
    for name, weight in base_weights(pruned_model()).items():
        assert (merged.get_submodule(name).weight[weight == 0] == 0).all(), name
    expected = factors(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(out)))

    card = (out / "README.md").read_text()
    assert card.count("import peft_spp") == 1 and "None" not in card
    assert f"fine-tuned version of `{base}`" in card
    # the layers are 2:4, and the run says so; other libraries' plans are not for its readers
    assert "Base:       2:4, 50 % zero" in result.stderr and "have no zeros" not in result.stderr
    assert "FutureWarning" not in result.stderr

    # as if killed while the last checkpoint was written
    (out / "checkpoint-4" / "trainer_state.json").unlink()
    assert last_complete_checkpoint(out) == str(out / "checkpoint-2")
    result = CliRunner().invoke(app, [*arguments, "--resume_from_checkpoint", "auto"])
    assert result.exit_code == 0 and "checkpoint-2" in result.output
    assert_equal(factors(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(out))), expected)


def test_the_card_that_is_pushed_says_how_to_load_the_adapter(tmp_path: Path) -> None:
    """TRL writes its card, of a whole model, once more before it pushes."""
    trainer = carded(SFTTrainer)(
        model=pruned_model(),
        args=SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tiny_tokenizer(),
        peft_config=spp_config(),
    )
    for _ in range(2):
        trainer.create_model_card(model_name="name")
        card = ModelCard.load(tmp_path / "README.md")
        assert card.data.library_name == "peft" and {"sft", "spp"} <= set(card.data.tags)
        assert card.text.count("import peft_spp") == 1


def test_a_dry_run_counts_the_adapters_parameters(
    base: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model_name_or_path", base, "--dataset_name", data, *SMALL, "--output_dir", str(tmp_path / "out")]
    main([*arguments, "--dry-run", "--spp_r", "2", "--spp_target_modules", "down_proj"])
    # two blocks with a down_proj of 16 rows and 24 inputs
    assert f"SPP on 2 layers, {2 * (2 * 24 + 16)} trainable parameters" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "extra, culprit",
    [
        (["--use_peft"], "--use_peft"),
        (["--lora_r", "8", "--lora_target_modules", "q_proj"], "--lora_r, --lora_target_modules"),
        (["--spp_dropout", "1.5"], "spp_dropout"),
        (["--spp_r", "0"], "The SPP arguments"),
        (["--no_such_flag", "1"], "--no_such_flag"),
        (["--config", "absent.yaml"], "absent.yaml"),
        (["--config"], "--config"),
        (["--spp_target_modules", "no_such_layer"], "no_such_layer"),
        (["--spp_target_modules", "embed_tokens"], "embed_tokens"),
        (["--dataset_train_split", "validation", "--dataset_name", "{folder}/plain"], "'validation'"),
        (["--eval_strategy", "steps", "--eval_steps", "1"], "'test'"),
        (["--eval_strategy", "epoch", "--test_split_size", "4"], "--test_split_size"),
        (["--dataset_name", "absent.jsonl"], "absent.jsonl"),
        (["--dataset_name", "./absent"], "./absent"),
        (["--dataset_name", "{folder}/notes.docx"], "notes.docx"),
        (["--dataset_name", "{folder}/empty.jsonl"], "empty.jsonl"),
        (["--dataset_name", "{folder}/broken.jsonl"], "JSON"),
        (["--dataset_name", "{folder}/bare"], "no data files"),
        (["--dataset_name", "{folder}/words.jsonl"], "'words'"),
        (["--dataset_text_field", "body"], "'body'"),
        (["--dataset_streaming"], "--max_steps"),
        (["--model_name_or_path", "./absent-model"], "./absent-model"),
        (["--model_name_or_path", "{folder}/no-tokenizer"], "tokenizer"),
        (["--model_name_or_path", "{folder}/classifier"], "LlamaForSequenceClassification"),
        (["--model_name_or_path", "{folder}/adapter"], "is an adapter"),
        (["--resume_from_checkpoint", "true"], "no complete checkpoint"),
        (["--resume_from_checkpoint", "{folder}/checkpoint-3"], "checkpoint-3"),
        (["--output_dir", "{base}"], "is the folder of the model"),
        (
            ["--teacher_model_name_or_path", "{folder}/teacher", "--output_dir", "{folder}/teacher/"],
            "is the folder of",
        ),
        (["--teacher_model_name_or_path", "{folder}/teacher"], "weights of"),
        (["--spp_trainable_token_indices", "9999"], "token 9999"),
        (["--spp_trainable_token_indices", "-1"], "token -1"),
        (["--chat_template_path", "absent.jinja"], "--chat_template_path 'absent.jinja' is not a file"),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps 0"),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size 0"),
        (["--learning_rate", "nan"], "--learning_rate nan"),
        (["--dataset_name", "{folder}/chat.jsonl"], "Row 2 of the split 'train' has a 'messages' without messages"),
        (["--dataset_name", "{folder}/ids.jsonl"], "token -3"),
        (["--dataset_name", "{folder}/value.jsonl"], "message 1 has no 'content'"),
        (
            ["--dataset_name", "{folder}/null.jsonl"],
            "Row 2 of the split 'train' has a 'messages' whose message 2 has no",
        ),
        (["--dataset_name", "{folder}/conversations.jsonl"], "go into a column 'messages'"),
        (["--dataset_name", "{folder}/labels.jsonl"], "a column 'labels', which TRL takes"),
        (["--dataset_name", "{folder}/no_label.jsonl"], "a column 'labels', which TRL takes"),
        (["--dataset_name", "{folder}/short.jsonl"], "other numbers of 'labels' than of 'input_ids'"),
        (["--dataset_name", "{folder}/header.csv"], "header.csv' cannot be loaded: it has no rows"),
        (["--chat_template_path", "{folder}/header.csv"], "should end with .jinja or .j2"),
        (["--chat_template_path", "{base}"], "is a model without a chat template"),
        (["--chat_template_path", "{folder}/bare"], "/bare' cannot be loaded"),
        (["--max_steps", "0"], "--max_steps 0 and --num_train_epochs 3 train nothing"),
        (["--num_train_epochs", "0"], "--num_train_epochs 0 train nothing"),
        (["--group_by_length"], "--train_sampling_strategy group_by_length"),
    ],
)
def test_what_cannot_be_used_is_named_and_nothing_is_written(
    extra: list[str], culprit: str, base: str, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    write_jsonl(folder / "data.jsonl")
    write_jsonl(folder / "words.jsonl", [{"words": "a b"}])
    write_jsonl(folder / "plain" / "data.jsonl")
    write_jsonl(folder / "chat.jsonl", [{"messages": [{"role": "user", "content": "a"}]}, {"messages": []}])
    write_jsonl(folder / "ids.jsonl", [{"input_ids": [1, -3, 2]}])
    user = {"role": "user", "content": "a"}
    write_jsonl(folder / "value.jsonl", [{"messages": [{"role": "user", "value": "a"}]}])
    write_jsonl(folder / "null.jsonl", [{"messages": [user]}, {"messages": [user, {"role": "user", "content": None}]}])
    write_jsonl(folder / "conversations.jsonl", [{"conversations": [user]}])
    write_jsonl(folder / "labels.jsonl", [{"text": "a", "labels": "good"}])
    write_jsonl(folder / "no_label.jsonl", [{"text": "a", "labels": None}, {"text": "a", "labels": "good"}])
    tokens = {"input_ids": [1, 2, 3], "labels": [1, 2, 3]}
    write_jsonl(folder / "short.jsonl", [tokens, {**tokens, "labels": [1, 2]}])
    (folder / "header.csv").write_text("text\n")
    shutil.copytree(base, folder / "teacher")
    (folder / "teacher" / "model.safetensors").write_bytes(b"x" * 20)
    (folder / "notes.docx").write_text("text")
    (folder / "empty.jsonl").touch()
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "bare").mkdir()
    pruned_model().config.save_pretrained(folder / "no-tokenizer")
    classifier = pruned_model("reward").config
    classifier.architectures = ["LlamaForSequenceClassification"]
    classifier.save_pretrained(folder / "classifier")
    tiny_tokenizer().save_pretrained(folder / "classifier")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    out = tmp_path / "out"
    arguments = ["--model_name_or_path", base, "--dataset_name", str(folder / "data.jsonl"), *SMALL]
    extra = [word.format(folder=folder, base=base) for word in extra]
    assert culprit in refusal(*arguments, "--output_dir", str(out), *extra)
    assert not out.exists()


@pytest.mark.parametrize("missing, culprit", [("model", "--model_name_or_path"), ("data", "--dataset_name")])
def test_a_model_and_one_source_of_data_are_wanted(missing: str, culprit: str, base: str, data: str) -> None:
    given = {"model": ["--model_name_or_path", base], "data": ["--dataset_name", data]}
    del given[missing]
    assert culprit in refusal(*(word for words in given.values() for word in words), *ON_CPU)


def test_unknown_keys_of_the_yaml_file_are_named(base: str, data: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("spp_rank: 4\n")
    arguments = ("--model_name_or_path", base, "--dataset_name", data, *SMALL, "--config", str(config))
    assert "YAML" in refusal(*arguments) and "--spp_rank (did you mean --spp_r?)" in refusal(*arguments)


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("--lerning_rate 3", "unknown flag --lerning_rate (did you mean --learning_rate?)"),
        ("--spp-targets q_proj v_proj --seed 1", "unknown flag --spp-targets"),
        ("--spp_exlude_modules=head", "--spp_exclude_modules"),
        ("--learning_rate fast", "invalid float value: 'fast'"),
        ("--spp_bias some", "choose from"),
        (
            "--warmup_ratio 0.03",
            "--warmup_ratio (did you mean --warmup_steps, which below 1 is a share of the steps?)",
        ),
        ("--zzzzz", "unknown flag --zzzzz. `peft-spp sft --help`"),
        ("word", "'word' is not a flag"),
    ],
)
def test_a_mistyped_flag_is_one_line_with_the_flags_like_it(words: str, shown: str) -> None:
    """Before anything about the values of the others, such as that there is no GPU."""
    result = CliRunner().invoke(app, ["sft", "--model_name_or_path", "x", "--dataset_name", "y", *words.split()])
    assert result.exit_code == 2 and result.stdout == ""
    assert shown in result.stderr and "--help" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("package", ["trl", "datasets"])
def test_a_missing_package_names_the_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    # importing it again replaces it in its package
    monkeypatch.setattr(peft_spp, "sft", peft_spp.sft)
    for module in list(sys.modules):
        if module.startswith("peft_spp.sft"):
            monkeypatch.delitem(sys.modules, module)
    result = CliRunner().invoke(app, ["sft", "--help-all"])
    assert result.exit_code == 2
    assert f"{package} is not installed. Install it with: {how_to_install('train')}" in result.output


def logged_losses(folder: Path) -> dict[int, float]:
    """The training losses that the last checkpoint of a run has recorded."""
    checkpoint = last_complete_checkpoint(folder)
    assert checkpoint is not None
    history = json.loads((Path(checkpoint) / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


@pytest.mark.slow
def test_two_launched_processes_train_as_one_does(base: str, data: str, tmp_path: Path) -> None:
    """The same four rows a step, in one process or in two that `accelerate launch` starts and gloo connects."""
    common = ["--model_name_or_path", base, "--dataset_name", data, *ON_CPU, "--report_to", "none"]
    common += ["--max_steps", "5", "--learning_rate", "2e-2", "--max_length", "32", "--logging_steps", "1"]
    one, two = tmp_path / "one", tmp_path / "two"
    main([*common, "--per_device_train_batch_size", "4", "--output_dir", str(one)])

    # the launcher of several processes on one machine is named for GPUs, and serves CPUs as well
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    arguments = [*common, "--per_device_train_batch_size", "2", "--output_dir", str(two)]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    completed = subprocess.run(
        [*launch, "-m", "peft_spp.sft", *arguments], env=os.environ | environment, capture_output=True, text=True
    )
    assert completed.returncode == 0, completed.stderr[-3000:]
    assert completed.stderr.count("Adapter:") == 1  # from the first process alone

    assert len(logged_losses(one)) == 5 and logged_losses(two) == pytest.approx(logged_losses(one), rel=1e-4)
    assert (two / "checkpoint-5" / "rng_state_1.pth").is_file()
    adapters = [
        factors(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder)))
        for folder in (one, two)
    ]
    for name, factor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], factor, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["--packing"],
        ["--dataset_streaming"],
        ["--eval_strategy", "steps", "--eval_steps", "1", "--test_split_size", "0.2"],
    ],
)
def test_flags_of_trl_reach_the_trainer(settings: list[str], base: str, data: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--model_name_or_path", base, "--dataset_name", data, *SMALL, "--output_dir", str(out)]
    arguments += ["--max_steps", "2"]
    main([*arguments, "--max_length", "100", "--logging_steps", "1", *settings])
    history = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert any("eval_loss" in entry for entry in history) is ("--eval_strategy" in settings)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(out))
    assert_zeros_kept(model, base_weights(pruned_model()))
