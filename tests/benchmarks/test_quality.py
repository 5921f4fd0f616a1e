# SPDX-License-Identifier: Apache-2.0
import json
import math
import random
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from typer.testing import CliRunner


pytest.importorskip("datasets")


from benchmarks.quality import __main__ as command
from benchmarks.quality import base_models, jobs, plan
from benchmarks.quality.analysis import analyze
from benchmarks.quality.data import load_texts
from benchmarks.quality.evaluation import exact_match, loss_per_token
from benchmarks.quality.methods import METHODS, SPP_RANK, equal_options, remask, replace_conv1d, trainable_parameters
from benchmarks.quality.page import write_report
from benchmarks.quality.store import Store
from benchmarks.quality.suites import AT_2_4, AT_75, QUICK, QUICK_GPT2, QUICK_LLAMA
from benchmarks.quality.tuning import TuningSettings, make_optimizers, train
from peft_spp.pruning.layers import find_target_layers, weight_matrix
from peft_spp.sparsity import sparsity_report


ROOT = Path(__file__).parents[2]


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
