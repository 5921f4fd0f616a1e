# SPDX-License-Identifier: Apache-2.0
import dataclasses
import itertools
import json
import math
import random
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
from benchmarks.quality import base_models, jobs, plan
from benchmarks.quality.analysis import analyze
from benchmarks.quality.data import load_texts
from benchmarks.quality.evaluation import exact_match, final_number, loss_per_token
from benchmarks.quality.methods import METHODS, SPP_RANK, equal_options, remask, replace_conv1d, trainable_parameters
from benchmarks.quality.page import finding, write_report
from benchmarks.quality.store import Store
from benchmarks.quality.suites import AT_2_4, AT_75, QUICK, QUICK_GPT2, QUICK_LLAMA, SMALL, SUITES, Pruning
from benchmarks.quality.tuning import TuningSettings, make_optimizers, order_of_blocks, train
from peft_spp import SPPConfig
from peft_spp.pruning.layers import find_target_layers, weight_matrix
from peft_spp.sparsity import sparsity_report


ROOT = Path(__file__).parents[2]
METAMATHQA = ROOT / "benchmarks" / "quality" / "metamathqa"


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    """Some problems and some text."""
    folder = tmp_path_factory.mktemp("data")
    for part, count in (("train", 60), ("test", 24)):
        rows = [
            {
                "question": f"Ann has {n} pens and buys {n + 2} in {part}. How many?",
                "answer": f"Sum.\n#### {2 * n + 2}",
            }
            for n in range(count)
        ]
        (folder / f"gsm8k_{part}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    words = random.Random(0).choices(["one", "word", "after", "another", "makes", "a", "text"], k=1200)
    articles = [f" = Title {n} = \n\n" + " ".join(words[40 * n : 40 * n + 40]) + f" {n}\n\n" for n in range(30)]
    (folder / "wiki.txt").write_text("".join(articles))
    return folder


@pytest.fixture(scope="module")
def quick_run(data_folder, tmp_path_factory):
    """The folder of a quick run, and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    result = run_quick(folder, data_folder)
    assert result.exit_code == 0, result.output
    return folder, result


def run_quick(folder, data_folder, *more):
    options = ["--quick", "--data", data_folder, "--output-dir", folder, "--machine", "here", "--work-dir"]
    return CliRunner().invoke(command.app, [str(option) for option in (*options, folder / "work", *more)])


def quick_base(spec, folder, data_folder):
    texts = load_texts(data_folder, seed=0)
    base = base_models.BaseModel(spec, texts, QUICK.budget, folder / "work", Accelerator(cpu=True))
    base.make(lambda step, loss: None)
    return base


def test_a_quick_run_measures_every_method_and_keeps_the_zeros_of_those_that_are_masked(quick_run):
    folder, _ = quick_run
    analysis = analyze(Store.open(folder / "here" / "quality-small-quick.json", "quick"))
    at_2_4 = {(one.method, one.deployment): one for one in analysis.of("llama", AT_2_4)}
    assert set(at_2_4) == {
        *((method, "merged") for method in METHODS),
        ("lora", "unmerged"),
        ("lora", "remasked"),
    }
    for (method, deployment), outcome in at_2_4.items():
        assert [run.settings["seed"] for run in outcome.runs] == [0, 1]
        assert all(math.isfinite(loss) for loss in outcome.losses)
        if (method, deployment) not in {("lora", "merged"), ("lora", "unmerged")}:
            assert outcome.deployed("zeros_lost") == [0, 0] and outcome.deployed("pattern_kept") == [True, True]
            assert outcome.deployed("sparsity") == [0.5, 0.5]
    assert all(lost > 0 for lost in at_2_4["lora", "merged"].deployed("zeros_lost"))
    assert at_2_4["lora", "merged"].deployed("pattern_kept") == [False, False]
    assert analysis.of("gpt2", AT_2_4)[0].deployed("pattern_kept") == [True]
    # every method of a pruned model was trained on as many tokens, but those that get as much time
    tokens = {one.measured("tokens") for one in analysis.outcomes if one.equal != "time"}
    assert len(tokens) == 1


def test_a_second_run_measures_nothing_again_and_writes_the_same(quick_run, data_folder, monkeypatch):
    folder, _ = quick_run
    path = folder / "here" / "quality-small-quick.json"
    before = json.loads(path.read_text())["records"]

    def fail(*arguments, **settings):
        raise AssertionError("it was measured already")

    for name in ("measure_base", "measure_steps", "measure_tuned"):
        monkeypatch.setattr(plan, name, fail)
    page = (folder / "here" / "quality-small-quick.md").read_bytes()
    result = run_quick(folder, data_folder)
    assert result.exit_code == 0, result.output
    assert json.loads(path.read_text())["records"] == before
    assert (folder / "here" / "quality-small-quick.md").read_bytes() == page


def test_a_run_that_was_cut_short_measures_only_what_is_missing(quick_run, data_folder, tmp_path, monkeypatch):
    folder, _ = quick_run
    content = json.loads((folder / "here" / "quality-small-quick.json").read_text())
    lost = [record for record in content["records"] if record["kind"] == "tune"][-2:]
    content["records"] = [record for record in content["records"] if record not in lost]
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "quality-small-quick.json").write_text(json.dumps(content))
    done = []

    def measured(*arguments, **settings):
        done.append(settings["seed"])
        return jobs.measure_tuned(*arguments, **settings)

    monkeypatch.setattr(plan, "measure_tuned", measured)
    result = run_quick(tmp_path, data_folder, "--work-dir", folder / "work")
    assert result.exit_code == 0, result.output
    assert done == [record["settings"]["seed"] for record in lost]
    again = json.loads((tmp_path / "here" / "quality-small-quick.json").read_text())["records"]
    # the same seed, the same result
    assert [one["measured"]["validation_loss"] for one in again[-2:]] == pytest.approx(
        [one["measured"]["validation_loss"] for one in lost], rel=1e-5
    )


def test_the_report_has_the_table_and_two_pictures(quick_run):
    folder, _ = quick_run
    page = (folder / "here" / "quality-small-quick.md").read_text()
    assert "**Wanda 2:4**" in page and "| none |" in page and "LoRA, merged and masked again" in page
    for name in ("sparsity", "parameters"):
        picture = folder / "here" / f"quality-small-quick-{name}.png"
        assert picture.read_bytes().startswith(b"\x89PNG") and f"]({picture.name})" in page
    assert "Learning rates" in page and "not been run on these checkpoints" in page
    assert str(folder) not in page and "has not run to its end" not in page


def test_the_page_of_a_suite_that_is_not_done_says_so(quick_run, tmp_path):
    folder, _ = quick_run
    content = json.loads((folder / "here" / "quality-small-quick.json").read_text())
    content["about"]["complete"] = False
    content["records"] = content["records"][: len(content["records"]) // 2]
    (tmp_path / "quality-small-quick.json").write_text(json.dumps(content))
    write_report(tmp_path, tmp_path / "page.md", quick=True)
    assert "has not run to its end" in (tmp_path / "page.md").read_text()


def test_results_of_another_suite_are_not_overwritten(quick_run, data_folder, tmp_path):
    (tmp_path / "here").mkdir()
    path = tmp_path / "here" / "quality-small-quick.json"
    path.write_text('{"benchmark": "layer"}')
    result = run_quick(tmp_path, data_folder)
    assert result.exit_code == 2 and path.read_text() == '{"benchmark": "layer"}'


@pytest.mark.parametrize(
    "arguments",
    [
        ["--suite", "unknown"],
        ["--model", "x"],
        ["--suite", "llama", "--model", "x"],
        ["--suite", "pretrained", "--data", "."],
        ["--suite", "pretrained", "--model", "."],
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is(arguments, tmp_path):
    result = CliRunner().invoke(command.app, [*arguments, "--output-dir", str(tmp_path)])
    assert result.exit_code == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("suite", SUITES)
def test_the_plan_of_a_suite_names_its_studies(suite):
    result = CliRunner().invoke(command.app, ["--suite", suite, "--plan"])
    assert result.exit_code == 0 and len(result.output.splitlines()) >= len(SUITES[suite].studies)


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

    assert plan.choose_rate((1e-2, 3e-2, 9e-2), loss) == pytest.approx(expected, rel=0.02)
    assert sorted(tried)[0] >= 1e-3 and len(tried) == len(set(tried)) <= 7


def test_a_grid_of_one_rate_is_not_extended_and_divergence_is_never_chosen():
    assert plan.choose_rate((4e-3,), lambda rate: 1.0) == 4e-3
    assert plan.choose_rate((1e-3, 1e-2, 1e-1), lambda rate: math.inf if rate > 1e-3 else 5.0) <= 1e-3


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
    assert plan.equal_time_steps(64, seconds, "spp", "hira") == 32
    assert plan.equal_time_steps(1, seconds, "spp", "hira") == 1
    assert plan.equal_time_steps(64, seconds, "hira", "spp") == 128


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


def test_B_can_have_another_rate_than_A(quick_run, data_folder):
    base = quick_base(QUICK_LLAMA, quick_run[0], data_folder)
    adapted = METHODS["spp"].adapt(base.load(AT_2_4), {})
    (optimizer,) = make_optimizers(adapted, TuningSettings(1e-2, 1, 1, 0, B_rate_ratio=4.0))
    groups = optimizer.param_groups
    assert [group["lr"] for group in groups] == [1e-2, 4e-2]
    sizes = [sum(parameter.numel() for parameter in group["params"]) for group in groups]
    layers = find_target_layers(base.load(AT_2_4), None).values()
    assert sizes == [sum(SPP_RANK * one.in_features for one in layers), sum(one.out_features for one in layers)]


@pytest.mark.parametrize("spec", [QUICK_LLAMA, QUICK_GPT2], ids=lambda spec: spec.name)
def test_muon_trains_the_matrices_inside_the_blocks_and_AdamW_the_rest(spec, quick_run, data_folder):
    model = quick_base(spec, quick_run[0], data_folder).load(None)
    optimizers = make_optimizers(model, TuningSettings(1e-2, 1, 1, 0, muon_rate=2e-2))
    trained = [{id(p) for group in one.param_groups for p in group["params"]} for one in optimizers]
    matrices = {id(layer.weight) for layer in find_target_layers(model, None).values()}
    assert trained == [{id(p) for p in model.parameters()} - matrices, matrices]


@pytest.mark.parametrize("spec", [QUICK_LLAMA, QUICK_GPT2], ids=lambda spec: spec.name)
@pytest.mark.parametrize("name", METHODS)
def test_a_merged_model_computes_what_the_trained_one_did(spec, name, quick_run, data_folder, tmp_path):
    if (spec, name) == (QUICK_GPT2, "supertuning"):
        pytest.skip("PEFT's Supertuning adapts linear layers only")
    base = quick_base(spec, quick_run[0], data_folder)
    method = METHODS[name]
    torch.manual_seed(0)
    adapted = method.adapt(base.load(AT_2_4), {})
    settings = TuningSettings(5e-2, steps=3, batch=2, seed=0)
    train(adapted, base.train_blocks, settings, base.accelerator)
    method.save(adapted, tmp_path / "adapter")
    ids = base.test_blocks
    with torch.no_grad():
        trained = adapted.eval()(input_ids=ids).logits
        merged = method.merge(base.load(AT_2_4), tmp_path / "adapter").eval()(input_ids=ids).logits
        before = base.load(AT_2_4).eval()(input_ids=ids).logits
    torch.testing.assert_close(merged, trained, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(trained, before, atol=1e-3)


def test_remasking_sets_to_zero_what_was_pruned_and_nothing_else(quick_run, data_folder):
    base = quick_base(QUICK_GPT2, quick_run[0], data_folder)
    pruned, model = base.load(AT_2_4), base.load(None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    before = {name: weight_matrix(layer).clone() for name, layer in find_target_layers(model, None).items()}
    remask(model, pruned)
    for name, layer in find_target_layers(pruned, None).items():
        mask, now = weight_matrix(layer) != 0, weight_matrix(find_target_layers(model, None)[name])
        assert torch.equal(now, torch.where(mask, before[name], 0.0))
        assert not now[~mask].signbit().any()


def test_linear_layers_in_the_place_of_conv1d_compute_the_same(quick_run, data_folder):
    base = quick_base(QUICK_GPT2, quick_run[0], data_folder)
    model, replaced = base.load(AT_2_4), base.load(AT_2_4)
    replace_conv1d(replaced)
    assert all(isinstance(layer, nn.Linear) for layer in find_target_layers(replaced, None).values())
    with torch.no_grad():
        ids = base.test_blocks
        torch.testing.assert_close(model(input_ids=ids).logits, replaced(input_ids=ids).logits)


@pytest.mark.parametrize("spec", [QUICK_LLAMA, QUICK_GPT2], ids=lambda spec: spec.name)
def test_no_other_rank_has_a_number_of_parameters_nearer_to_that_of_spp(spec, quick_run, data_folder):
    base = quick_base(spec, quick_run[0], data_folder)
    counts = {
        r: trainable_parameters(METHODS["hira"].adapt(base.load(AT_2_4), {"r": r})) for r in range(1, SPP_RANK + 1)
    }
    spp = trainable_parameters(METHODS["spp"].adapt(base.load(AT_2_4), {}))
    assert equal_options(base.load(AT_2_4), "hira") == {"r": min(counts, key=lambda r: abs(counts[r] - spp))}
    if spec is QUICK_LLAMA:
        share = METHODS["supertuning"].adapt(base.load(AT_2_4), equal_options(base.load(AT_2_4), "supertuning"))
        # each layer trains a whole number of entries
        assert trainable_parameters(share) == pytest.approx(spp, rel=0.01)
    masked = METHODS["masked_lora"].adapt(base.load(AT_2_4), {"r": 3})
    assert trainable_parameters(masked) == counts[3]


def test_masked_full_fine_tuning_counts_only_what_is_not_pruned(quick_run, data_folder):
    base = quick_base(QUICK_LLAMA, quick_run[0], data_folder)
    adapted = METHODS["masked_full"].adapt(base.load(AT_75), {})
    report = sparsity_report(base.load(AT_75))
    assert trainable_parameters(adapted) == report.numel - report.zeros


def test_the_loss_is_the_mean_over_all_predicted_tokens(quick_run, data_folder):
    base = quick_base(QUICK_LLAMA, quick_run[0], data_folder)
    model = base.load(None).double()
    blocks = torch.randint(0, 300, (19, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        scores = model(input_ids=blocks).logits[:, :-1].log_softmax(-1)
    expected = -scores.gather(2, blocks[:, 1:, None]).mean().item()
    assert loss_per_token(model, blocks, torch.device("cpu")) == pytest.approx(expected, rel=1e-6)


def test_texts_are_split_without_an_overlap(data_folder):
    texts = load_texts(data_folder, seed=0)
    parts = [set(part) for part in (texts.train, texts.validation, texts.test)]
    assert all(parts) and not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert len(texts.problems) == 12 and all(problem.text in texts.test for problem in texts.problems)
    assert sum("Title" in text for text in texts.train) > 20 and any("Title" in text for text in texts.test)
    assert texts == load_texts(data_folder, seed=0) and texts.fingerprint != load_texts(data_folder, 1).fingerprint


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


class Answering:
    """A model that answers prompts from a list, whatever they are padded with."""

    def __init__(self, tokenizer, answers):
        self.tokenizer, self.answers = tokenizer, answers

    def eval(self):
        return self

    def generate(self, input_ids, attention_mask, **settings):
        prompts = [row[mask.bool()] for row, mask in zip(input_ids, attention_mask, strict=True)]
        answers = [self.answers[self.tokenizer.decode(prompt)] for prompt in prompts]
        tokens = self.tokenizer(answers, return_tensors="pt", padding=True, padding_side="right")["input_ids"]
        return torch.cat([input_ids, tokens], dim=1)


def test_exact_match_counts_the_answers_with_the_right_result(quick_run, data_folder):
    base = quick_base(QUICK_LLAMA, quick_run[0], data_folder)
    problems = load_texts(data_folder, seed=0).problems
    wrong, missing = problems[0], problems[3]
    answers = {problem.prompt: f" It is {problem.answer}" for problem in problems}
    answers[wrong.prompt], answers[missing.prompt] = " #### 999", " I do not know."
    model = Answering(base.tokenizer, answers)
    assert exact_match(model, base.tokenizer, problems, torch.device("cpu")) == pytest.approx(10 / 12)
