# SPDX-License-Identifier: Apache-2.0
"""The suite of published checkpoints, on a tiny local one with a local task of lm-evaluation-harness."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


pytest.importorskip("datasets")

from benchmarks.quality import __main__ as command
from benchmarks.quality.harness_tasks import evaluate_tasks
from benchmarks.quality.suites import CHECKPOINTS
from peft_spp.demo.data import train_tokenizer
from peft_spp.pruning import prune_magnitude


ROOT = Path(__file__).parents[2]
TASK = """
task: colours
dataset_path: json
dataset_kwargs:
  data_files: {file}
output_type: multiple_choice
test_split: train
doc_to_text: "The colour of the {{{{thing}}}} is"
doc_to_choice: ["red", "green"]
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny pruned Llama, a task, and text."""
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "data").mkdir()
    lines = [
        f"The colour of the thing {n} is {'red' if n % 2 else 'green'}, and it is {n} years old." for n in range(400)
    ]
    (folder / "data" / "text.txt").write_text("\n\n".join(lines))
    tokenizer = train_tokenizer(lines, 320)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=512,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).bfloat16()
    prune_magnitude(model, pattern="2:4")
    model.save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    (folder / "tasks").mkdir()
    (folder / "tasks" / "documents.jsonl").write_text(
        "".join(json.dumps({"thing": f"thing {n}", "label": n % 2}) + "\n" for n in range(6))
    )
    (folder / "tasks" / "colours.yaml").write_text(TASK.format(file=folder / "tasks" / "documents.jsonl"))
    return folder


def arguments(checkpoint, output):
    return [
        *("--suite", "llama", "--model", str(checkpoint / "tiny"), "--data", str(checkpoint / "data")),
        *("--task", "colours", "--task-folder", str(checkpoint / "tasks"), "--steps", "1"),
        *("--output-dir", str(output), "--machine", "here", "--page", str(output / "page.md")),
    ]


def check_results(output):
    records = json.loads((output / "here" / "quality-llama.json").read_text())["records"]
    tuned = [record for record in records if record["kind"] == "tune"]
    assert {record["settings"]["method"] for record in tuned} == {
        contender.method for contender in CHECKPOINTS.studies[0].contenders
    }
    for record in tuned:
        for name, deployed in record["measured"]["deployments"].items():
            assert 0 <= deployed["tasks"]["colours"]["acc"] <= 1, name
        if record["settings"]["method"] != "lora":
            assert record["measured"]["deployments"]["merged"]["zeros_lost"] == 0
            assert record["measured"]["deployments"]["merged"]["pattern_kept"] is True
    assert "colours" in (output / "page.md").read_text()


@pytest.mark.slow
def test_a_local_checkpoint_is_tuned_and_evaluated_on_a_local_task(checkpoint, tmp_path):
    pytest.importorskip("lm_eval")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.quality", *arguments(checkpoint, tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    check_results(tmp_path)


@pytest.mark.slow
def test_two_processes_of_accelerate_share_the_work(checkpoint, tmp_path):
    pytest.importorskip("lm_eval")
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    done = subprocess.run(
        [*launch, "-m", "benchmarks.quality", *arguments(checkpoint, tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    check_results(tmp_path)


def test_without_the_evaluation_harness_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"peft-spp\[quality\]"):
        evaluate_tasks("nowhere", ["colours"], torch.device("cpu"))


def test_a_folder_is_studied_as_the_first_checkpoint_and_names_choose_their_own(tmp_path):
    chosen = command.choose_models(CHECKPOINTS, [str(tmp_path), "llama-2-7b-70"])
    assert [model.name for model in chosen.models] == [tmp_path.name, "llama-2-7b-70"]
    assert [(study.model, study.pruning.request) for study in chosen.studies] == [
        (tmp_path.name, "2:4"),
        ("llama-2-7b-70", 0.7),
    ]
    assert command.choose_models(CHECKPOINTS, []) == CHECKPOINTS
