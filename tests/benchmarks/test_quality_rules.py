# SPDX-License-Identifier: Apache-2.0
"""What the benchmark of quality chooses and counts by, without a run: plans, rates, batches, results, settings."""

import dataclasses
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from typer.testing import CliRunner


pytest.importorskip("datasets")

from peft import PeftConfig

from benchmarks.quality import __main__ as command
from benchmarks.quality import rates
from benchmarks.quality.analysis import analyze
from benchmarks.quality.data import load_texts
from benchmarks.quality.design import Contender, Pruning, Study
from benchmarks.quality.estimate import planned_steps
from benchmarks.quality.evaluation import final_number
from benchmarks.quality.methods import METHODS
from benchmarks.quality.page import finding
from benchmarks.quality.store import Store
from benchmarks.quality.suites import AT_2_4, AT_75, SMALL, SUITES
from benchmarks.quality.tuning import TuningSettings, order_of_blocks, train
from peft_spp import SPPConfig


ROOT = Path(__file__).parents[2]
METAMATHQA = ROOT / "benchmarks" / "quality" / "metamathqa"


@pytest.mark.parametrize("suite", SUITES)
def test_the_plan_of_a_suite_names_its_studies(suite):
    result = CliRunner().invoke(command.app, ["--suite", suite, "--plan"])
    assert result.exit_code == 0 and len(result.output.splitlines()) >= len(SUITES[suite].studies)


def test_the_plan_of_checkpoints_says_what_they_take_on_a_gpu():
    output = CliRunner().invoke(command.app, ["--suite", "llama", "--plan", "--method", "spp"]).output
    said = [line for line in output.splitlines() if "GPU memory" in line]
    assert len(said) == len(SUITES["llama"].models)
    # 8,030,261,248 parameters of two bytes
    memory, base = map(float, re.search(r"([\d.]+) GB of GPU memory \(base model ([\d.]+) GB\)", said[0]).groups())
    assert base == 16.1 and 17 < memory < 24
    seconds, fewest, most = map(float, re.search(r"([\d.]+) s a step .* ([\d.]+) to ([\d.]+) hours", said[0]).groups())
    # twice the parameters forward, the same again with checkpointing, and for the gradient of the input
    assert 6 * 7.5e9 * 32 * 512 / (0.4 * 312e12) < seconds < 8.5 * 8.1e9 * 32 * 512 / (0.4 * 312e12)
    # a run at each of three rates, and at most at four more
    assert fewest == pytest.approx(3 * 500 * seconds / 3600, rel=0.05)
    assert most == pytest.approx(7 * 500 * seconds / 3600, rel=0.05)


def test_runs_that_studies_share_are_planned_once():
    study = Study("tiny", AT_2_4, (Contender("spp", rates=(1.0, 2.0)),), seeds=(0, 1))
    budget = dataclasses.replace(SMALL.budget, steps=10, batch=2, rate_steps=None)
    assert planned_steps((study, study), budget) == 30 and planned_steps((study,), budget, more_rates=2) == 50
    short = dataclasses.replace(budget, rate_steps=4)
    assert planned_steps((study,), short) == planned_steps((study,), short, more_rates=2) == 20 + 2 * 4 / 2


def test_the_small_suite_has_every_pruning_and_three_seeds_where_claims_are_made():
    llama = [study for study in SMALL.studies if study.model == "llama"]
    assert {study.pruning.name for study in llama} == {
        f"{method}-{request}"
        for method in ("magnitude", "wanda", "sparsegpt")
        for request in (0.5, "2:4", "4:8", 0.75, "2:8")
    }
    for pruning in (AT_2_4, AT_75):
        studies = [study for study in llama if study.pruning == pruning]
        assert all(len(study.seeds) == 3 and study.rates_from is None for study in studies)
        contenders = [one for study in studies for one in study.contenders]
        assert {one.method for one in contenders} == set(METHODS)
        assert {one.equal for one in contenders if one.method in ("hira", "masked_lora")} == {
            None,
            "parameters",
            "time",
        }


def losses_around(best):
    return lambda rate: abs(math.log(rate / best))


@pytest.mark.parametrize(
    ("best", "expected"),
    [
        (3e-2, 3e-2),
        (9e-2, 9e-2),
        (2.7e-1, 2.7e-1),
        (10.0, 8.1e-1),
        (3.3e-3, 3.3e-3),
        (1e-9, 1.1e-3),
        # halfway between two of the grid
        (1.8e-2, 1.7e-2),
        (5e-2, 5.2e-2),
    ],
)
def test_the_best_rate_is_chosen_from_a_grid_that_is_extended_at_an_edge_and_refined(best, expected):
    tried = []

    def loss(rate):
        tried.append(rate)
        return losses_around(best)(rate)

    assert rates.choose_rate((1e-2, 3e-2, 9e-2), loss) == pytest.approx(expected, rel=0.02)
    assert sorted(tried)[0] >= 1e-3 and len(tried) == len(set(tried)) <= 7


def test_a_grid_of_one_rate_is_not_extended_and_divergence_is_never_chosen():
    assert rates.choose_rate((4e-3,), lambda rate: 1.0) == 4e-3
    assert rates.choose_rate((1e-3, 1e-2, 1e-1), lambda rate: math.inf if rate > 1e-3 else 5.0) <= 1e-3


@pytest.mark.parametrize(("count", "batch", "steps"), [(7, 3, 9), (5, 5, 2), (4, 8, 3)])
def test_every_block_comes_once_before_any_comes_again(count, batch, steps):
    order = order_of_blocks(count, steps, batch, seed=3)
    assert [len(numbers) for numbers in order] == [batch] * steps
    flat = list(itertools.chain(*order))
    for start in range(0, len(flat) - count + 1, count):
        assert sorted(flat[start : start + count]) == list(range(count))
    assert order == order_of_blocks(count, steps, batch, seed=3) != order_of_blocks(count, steps, batch, seed=4)
    # a longer run begins with the same tokens
    assert order_of_blocks(count, steps + 4, batch, seed=3)[:steps] == order


def test_steps_at_equal_time_follow_the_ratio_within_rounds():
    seconds = {"spp": {"seconds": [1.0, 2.0, 10.0]}, "hira": {"seconds": [2.0, 4.0, 20.0]}}
    assert rates.equal_time_steps(64, seconds, "spp", "hira") == 32
    assert rates.equal_time_steps(1, seconds, "spp", "hira") == 1
    assert rates.equal_time_steps(64, seconds, "hira", "spp") == 128


class Recorder(nn.Module):
    """A model that keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
        self.seen = []

    def forward(self, input_ids, labels):
        self.seen.append(input_ids)
        loss = (self.weight * input_ids.double().mean()) ** 2
        return dataclasses.make_dataclass("Output", ["loss"])(loss.sum())


@pytest.mark.parametrize("micro_batch", [None, 1, 3])
def test_micro_batches_give_the_gradient_of_the_whole_batch(micro_batch):
    blocks = torch.arange(24).reshape(8, 3)
    settings = TuningSettings(1e-2, steps=5, batch=4, seed=0, micro_batch=micro_batch)
    model = Recorder()
    record = train(model, blocks, settings, Accelerator(cpu=True))
    assert record.tokens == 5 * 4 * 3 and len(record.losses) == 5
    assert torch.equal(torch.cat(model.seen), blocks[list(itertools.chain(*order_of_blocks(8, 5, 4, 0)))])
    if micro_batch == 1:
        # the mean over single blocks, which a float64 reference makes of the first step
        first = blocks[order_of_blocks(8, 1, 4, 0)[0]].double()
        assert record.losses[0] == pytest.approx(((2.0 * first.mean(dim=1)) ** 2).mean().item())


def test_training_that_diverges_is_stopped_and_told():
    model = Recorder()
    with torch.no_grad():
        model.weight.fill_(math.nan)
    record = train(model, torch.ones(4, 2), TuningSettings(1.0, 10, 2, 0), Accelerator(cpu=True))
    assert record.diverged and len(record.losses) == 1


def test_one_long_file_is_split_by_paragraphs(tmp_path):
    paragraphs = [f"Paragraph {n} of the file. " * 5 for n in range(200)]
    (tmp_path / "long.txt").write_text("\n\n".join(paragraphs))
    texts = load_texts(tmp_path, seed=0)
    assert texts.validation and texts.test
    together = "\n\n".join((*texts.train, *texts.validation, *texts.test))
    assert sorted(part.strip() for part in together.split("\n\n")) == sorted(part.strip() for part in paragraphs)


def test_without_a_folder_the_text_is_pythons_documentation():
    texts = load_texts(None, seed=0)
    assert sum(map(len, texts.train)) > 100_000 and texts.test and texts.validation and not texts.problems


def test_a_folder_without_text_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("This says what is in the folder.")
    result = CliRunner().invoke(command.app, ["--quick", "--data", str(tmp_path), "--output-dir", str(tmp_path)])
    assert result.exit_code == 2 and not list(tmp_path.glob("*/*"))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so it is #### 1,234", "1234"),
        ("#### $5.50.", "5.5"),
        ("#### -3", "-3"),
        ("#### 7.0", "7"),
        ("72", None),
        ("####", None),
    ],
)
def test_the_result_of_an_answer(text, number):
    assert final_number(text) == number


@pytest.mark.parametrize("pruning", [Pruning("wanda", "2:4"), Pruning("sparsegpt", 0.75), Pruning("published", 0.7)])
def test_a_pruning_can_be_read_from_its_name(pruning):
    assert Pruning.of(pruning.name) == pruning


def made_up_store(tmp_path, losses):
    """Results with given test losses: dense 2, pruned 3, and three seeds of each method."""
    store = Store("small", tmp_path / "quality-small.json")
    store.begin({}, {})
    common = {"base": "b", "model": "llama"}
    for pruning, loss in ((None, 2.0), ("wanda-2:4", 3.0)):
        store.add("base", {**common, "pruning": pruning}, {"test_loss": loss})
    for (method, _), own in losses.items():
        for seed in range(3):
            settings = {
                "method": method,
                "options": {},
                "equal": None,
                "rate": 0.1,
                "seed": seed,
                "steps": 1,
                "batch": 1,
            }
            deployed = {"test_loss": own + 0.01 * seed, "zeros_lost": 0, "pattern_kept": True, "sparsity": 0.5}
            deployments = {name: dict(deployed) for name in METHODS[method].deployments}
            store.add(
                "tune",
                {**common, "pruning": "wanda-2:4", **settings},
                {"validation_loss": own, "deployments": deployments, "trainable": 1},
            )
    return store


def test_the_finding_ranks_the_methods_and_tells_what_was_won_back(tmp_path):
    losses = {("spp", "merged"): 2.4, ("masked_full", "merged"): 2.2, ("lora", "merged"): 2.5, ("ia3", "merged"): 2.6}
    analysis = analyze(made_up_store(tmp_path, losses))
    spp = analysis.find("llama", AT_2_4, "spp")
    assert spp.recovery.mean == pytest.approx(0.59) and spp.recovery.count == 3
    said = finding(analysis, "llama", AT_2_4)
    assert "from 7.39 to 20.09" in said and f"SPP, r=16 {math.exp(2.41):.2f}" in said and "59%" in said
    places = [said.index(name) for name in ("Masked full", "SPP, r=16", "LoRA", "IA³")]
    assert places == sorted(places) and "SPP lost 0 zeros in 3 models" in said


def test_a_list_of_numbers_is_a_line_of_the_file(tmp_path):
    store = Store("small", tmp_path / "quality-small.json")
    measured = {"few": [1e-05, -2, 0.5], "none": [], "deep": [[1], ["2"]]}
    store.begin({}, {})
    store.add("tune", {"a": "[\n 1\n]"}, measured)
    assert '"few": [1e-05, -2, 0.5],' in store.path.read_text()
    assert Store.open(store.path, "small").find("tune", {"a": "[\n 1\n]"}) == measured


def test_the_store_finds_what_it_has_by_its_settings_alone(tmp_path):
    store = Store("small", tmp_path / "deep" / "quality-small.json")
    store.begin({}, {})
    store.add("tune", {"a": 1, "b": {"r": 8}}, {"loss": None})
    again = Store.open(store.path, "small")
    assert again.find("tune", {"b": {"r": 8}, "a": 1}) == {"loss": None}
    assert again.find("base", {"a": 1, "b": {"r": 8}}) is None and again.find("tune", {"a": 1}) is None
    with pytest.raises(ValueError, match="small"):
        Store.open(store.path, "full")
    with pytest.raises(ValueError, match="JSON"):
        store.add("tune", {"a": 2}, {"loss": math.nan})
    assert Store.open(store.path, "small").find("tune", {"a": 1, "b": {"r": 8}}) == {"loss": None}


def test_a_store_takes_what_another_one_has_too(tmp_path):
    own, other, third = (Store("small", tmp_path / f"{name}.json") for name in ("own", "other", "third"))
    own.begin({"cpu": "one"}, {})
    own.add("tune", {"base": "b", "seed": 1, "rate": 0.1}, {"loss": 1.0})
    own.add("unstable", {"base": "b", "seed": 3, "rate": 0.1}, {"loss": 1.0})
    other.begin({"cpu": "two"}, {"text": "t"})
    for seed, loss in ((1, 2.0), (2, 3.0), (3, 4.0)):
        other.add("tune", {"base": "b", "seed": seed, "rate": 0.1}, {"loss": loss})
    for _ in range(2):
        own.take(other)
        assert [(one.settings["seed"], one.measured["loss"], one.environment) for one in own.records] == [
            (1, 1.0, 0),
            (3, 1.0, 0),
            (2, 3.0, 1),
        ]
        assert own.environments == [{"cpu": "one"}, {"cpu": "two"}]
    # seeds of one contender are averaged, so that all have as many steps
    own.add("tune", {"base": "b", "seed": 4, "rate": 0.1, "steps": 9}, {"loss": 1.0})
    third.begin({"cpu": "two"}, {})
    third.add("tune", {"base": "b", "seed": 5, "rate": 0.1, "steps": 9}, {"loss": 1.0})
    third.add("tune", {"base": "b", "seed": 4, "rate": 0.1, "steps": 8}, {"loss": 1.0})
    with pytest.raises(ValueError, match=r"third\.json has the run .*'steps': 8.* has it as .*'steps': 9"):
        own.take(third)
    assert len(own.records) == 4
    # runs at another rate are other runs
    third.records[1:] = [dataclasses.replace(third.records[0], settings={"base": "b", "seed": 1, "rate": 0.3})]
    own.take(third)
    assert len(own.records) == 6
    third.records = [dataclasses.replace(third.records[0], settings={"base": "c"})]
    with pytest.raises(ValueError, match="another base model: c"):
        own.take(third)
    empty = Store("small", tmp_path / "empty.json")
    empty.take(other)
    assert len(empty.records) == 3 and empty.about == {**other.about}


@pytest.mark.parametrize("folder", sorted((METAMATHQA / "experiments" / "spp").iterdir()), ids=lambda path: path.name)
def test_the_settings_for_metamathqa_are_of_spp(folder):
    config = PeftConfig.from_pretrained(str(folder))
    assert isinstance(config, SPPConfig) and config.task_type == "CAUSAL_LM" and config.spp_alpha == 2 * config.r
    training = json.loads((folder / "training_params.json").read_text())
    assert set(training) == {"optimizer_kwargs"} and training["optimizer_kwargs"]["lr"] > 0
    assert f"lr_{training['optimizer_kwargs']['lr']:.0e}".replace("e-0", "e-") in folder.name


@pytest.mark.slow
def test_the_runner_for_metamathqa_lets_a_script_load_the_settings(tmp_path):
    (tmp_path / "helper.py").write_text("import sys\npath = sys.argv[-1]\n")
    (tmp_path / "run.py").write_text(
        "import sys\nfrom peft import PeftConfig\nfrom helper import path\n"
        'if __name__ == "__main__":\n    print(sys.argv[0], PeftConfig.from_pretrained(path).peft_type.value)\n'
    )
    experiment = METAMATHQA / "experiments" / "spp" / "llama-3.2-3B-r16-lr_4e-3"
    run = [sys.executable, METAMATHQA / "run_with_spp.py", "-v", experiment]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["run.py", "SPP"], done.stderr
