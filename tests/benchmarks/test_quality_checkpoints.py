# SPDX-License-Identifier: Apache-2.0
"""The suite of published checkpoints, on a tiny local one with a local task of lm-evaluation-harness."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner


pytest.importorskip("datasets")

from benchmarks.quality import __main__ as command
from benchmarks.quality import jobs, samples
from benchmarks.quality.base_models import BaseModel
from benchmarks.quality.data import load_texts
from benchmarks.quality.design import Checkpoint, Pruning, Study
from benchmarks.quality.harness_tasks import evaluate_tasks
from benchmarks.quality.methods import METHODS
from benchmarks.quality.pretrained.suite import FOUR, OTHERS, PRETRAINED
from benchmarks.quality.suites import AT_2_4, CHECKPOINTS
from benchmarks.quality.tuning import distillation_loss
from peft_spp.demo.data import train_tokenizer
from peft_spp.pruning import prune_magnitude


ROOT = Path(__file__).parents[2]
TASK = """
task: colors
dataset_path: json
dataset_kwargs:
  data_files: {file}
output_type: multiple_choice
test_split: train
doc_to_text: "The color of the {{{{thing}}}} is"
doc_to_choice: ["red", "green"]
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny Llama, dense and pruned, a task, and text."""
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "data").mkdir()
    lines = [
        f"The color of the thing {n} is {'red' if n % 2 else 'green'}, and it is {n} years old." for n in range(400)
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
    for name in ("dense", "tiny"):
        if name == "tiny":
            prune_magnitude(model, pattern="2:4")
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "tasks").mkdir()
    (folder / "tasks" / "documents.jsonl").write_text(
        "".join(json.dumps({"thing": f"thing {n}", "label": n % 2}) + "\n" for n in range(6))
    )
    (folder / "tasks" / "colors.yaml").write_text(TASK.format(file=folder / "tasks" / "documents.jsonl"))
    return folder


def arguments(checkpoint, output):
    return [
        *("--suite", "llama", "--model", str(checkpoint / "tiny"), "--data", str(checkpoint / "data")),
        *("--task", "colors", "--task-folder", str(checkpoint / "tasks"), "--steps", "1"),
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
            assert 0 <= deployed["tasks"]["colors"]["acc"] <= 1, name
        if record["settings"]["method"] != "lora":
            assert record["measured"]["deployments"]["merged"]["zeros_lost"] == 0
            assert record["measured"]["deployments"]["merged"]["pattern_kept"] is True
    assert "colors" in (output / "page.md").read_text()


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


@pytest.fixture
def questions(checkpoint):
    """The folder of the text, with questions as well."""
    rows = [{"question": f"Is thing {n} red?", "choices": ["red", "it is green"], "answer": n % 2} for n in range(9)]
    (checkpoint / "data" / "colors_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return checkpoint / "data"


@pytest.mark.slow
def test_a_dense_model_is_pruned_tuned_and_asked_questions(checkpoint, questions, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    budget = replace(PRETRAINED.budget, steps=2, rate_steps=1, sampled_blocks=2, task_limit=7, apart_blocks=2)
    monkeypatch.setattr(samples, "BATCH", 2)
    studies = (
        replace(PRETRAINED.studies[0], seeds=(0, 1)),
        Study("pretrained", AT_2_4, (OTHERS[3], OTHERS[1])),
        Study("pretrained", Pruning("wanda", 0.5), FOUR[:1], rates_from=AT_2_4),
        Study("pretrained", AT_2_4, (*FOUR, OTHERS[3]), steps_only=True),
    )
    small = replace(PRETRAINED, budget=replace(budget, calibration_blocks=2, timing_rounds=1), studies=studies)
    monkeypatch.setitem(command.ALL_SUITES, "pretrained", small)
    options = ["--suite", "pretrained", "--model", checkpoint / "dense", "--data", questions, "--machine", "here"]
    options += ["--output-dir", tmp_path, "--page", tmp_path / "page.md", "--work-dir", tmp_path / "work"]
    result = CliRunner().invoke(command.app, list(map(str, options)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "0 steps left" in result.output
    content = (tmp_path / "here" / "quality-pretrained.json").read_text()
    assert str(tmp_path) not in content and str(checkpoint) not in content
    records = json.loads(content)["records"]
    tuned = [record for record in records if record["kind"] == "tune"]
    assert len(tuned) == 2 * len(FOUR) + 3
    deployed = [one for record in tuned for one in record["measured"]["deployments"].items()]
    assert all(len(one["tasks"]["colors"]["acc_norm right"]) == 7 for name, one in deployed if name != "unmerged")
    assert all(one["zeros_lost"] == 0 for name, one in deployed if name == "remasked")
    assert all(set(one["losses"]) == {"text", "unlike"} for _, one in deployed)
    assert "tasks" in (tmp_path / "page.md").read_text() and (tmp_path / "here" / "quality-pretrained.png").is_file()
    base = BaseModel(
        Checkpoint("dense", str(checkpoint / "dense")),
        load_texts(questions, seed=0),
        small.budget,
        tmp_path / "work",
        Accelerator(cpu=True),
    )
    folders = {None: checkpoint / "dense", "wanda-2:4": next(tmp_path.glob("work/*/wanda-2-4"))}
    for pruning, folder in folders.items():
        # the same by a few lines of plain Transformers
        scores = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(base.apart_blocks["unlike"]).logits
        loss = -scores[:, :-1].log_softmax(-1).gather(2, base.apart_blocks["unlike"][:, 1:, None]).mean()
        (record,) = (one for one in records if one["kind"] == "base" and one["settings"]["pruning"] == pruning)
        assert record["measured"]["losses"]["unlike"] == pytest.approx(loss.item(), rel=1e-5)
    # the teacher and the samples change what is learned
    first = [record["measured"]["first_loss"] for record in tuned if record["settings"]["method"] == "spp_positive"]
    assert first[0] != first[2]


def test_a_measurement_that_was_stopped_is_continued_where_it_was(checkpoint, tmp_path, monkeypatch):
    budget = replace(PRETRAINED.budget, task_limit=None, calibration_blocks=2)
    texts = load_texts(checkpoint / "data", seed=0)
    base = BaseModel(Checkpoint("dense", str(checkpoint / "dense")), texts, budget, tmp_path, Accelerator(cpu=True))
    run = partial(jobs.measure_tuned, base, AT_2_4, METHODS["lora"], {}, rate=1e-3, seed=0, steps=1)
    measure, measured = jobs._measure_deployment, []

    def stop_at_the_third(*arguments):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(arguments[3])
        return measure(*arguments)

    monkeypatch.setattr(jobs, "_measure_deployment", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(on_step=lambda step, loss: None)
    monkeypatch.setattr(jobs, "train", None)
    monkeypatch.setattr(jobs, "_measure_deployment", lambda *arguments: {"deployment": arguments[3]})
    done = run(on_step=lambda step, loss: None)["deployments"]
    assert [*done] == ["unmerged", "merged", "remasked"] and measured == ["unmerged", "merged"]
    assert done["merged"]["zeros_lost"] > 0 and done["remasked"] == {"deployment": "remasked"}
    assert not list((base.folder / "unfinished").iterdir())


def test_the_distillation_loss_is_the_divergence_from_the_teacher():
    torch.manual_seed(0)
    scores, wanted = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)

    def fixed(logits):
        return lambda input_ids: SimpleNamespace(logits=logits)

    p, q = wanted.softmax(-1), scores.softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean()
    assert distillation_loss(fixed(scores), fixed(wanted), torch.zeros(2, 3)).item() == pytest.approx(
        expected.item(), rel=1e-5
    )
    assert distillation_loss(fixed(scores), fixed(scores), torch.zeros(2, 3)).item() == pytest.approx(0, abs=1e-6)


def test_without_the_evaluation_harness_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"\[quality\]"):
        evaluate_tasks("nowhere", ["colors"], torch.device("cpu"))


def test_a_folder_is_studied_as_the_first_checkpoint_and_names_choose_their_own(tmp_path):
    chosen = command.choose_models(CHECKPOINTS, [str(tmp_path), "llama-2-7b-70"])
    assert [model.name for model in chosen.models] == [tmp_path.name, "llama-2-7b-70"]
    assert [(study.model, study.pruning.request) for study in chosen.studies] == [
        (tmp_path.name, "2:4"),
        ("llama-2-7b-70", 0.7),
    ]
    assert command.choose_models(CHECKPOINTS, []) == CHECKPOINTS
