# SPDX-License-Identifier: Apache-2.0
"""What the suite of a pretrained model says of made-up results."""

import json
import math
import re
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import typer
from rich.progress import Progress


pytest.importorskip("datasets")

from benchmarks.quality import plan
from benchmarks.quality.__main__ import described, narrow
from benchmarks.quality.data import load_texts
from benchmarks.quality.design import Contender, Pruning, Study
from benchmarks.quality.estimate import Estimate
from benchmarks.quality.harness_tasks import _probability, write_tasks
from benchmarks.quality.pretrained import FOUR, IA3, MASKED_LORA, POSITIVE, PRETRAINED, SPP, distilled
from benchmarks.quality.pretrained_page import write_pretrained
from benchmarks.quality.pretrained_results import comparisons_of
from benchmarks.quality.store import Store
from benchmarks.quality.suites import AT_2_4


COMMON = {"base": "b", "model": "tiny"}
ENVIRONMENT = {
    "command": "python -m benchmarks.quality --suite pretrained --model FOLDER",
    "hardware": {"gpu": None, "cpu": "CPU", "cpu_capability": "AVX2"},
    "threads": {"torch": 1},
    "versions": {"torch": "2", "python": "3", "peft": "0", "transformers": "5"},
}


TRAINED = {
    "tokens": 1024,
    "trainable": 10,
    "adapter_bytes": 40,
    "cpu_seconds": 3.0,
    "validation_loss": 3.0,
    "first_loss": 4.0,
}
SUITE = replace(PRETRAINED, reference=None)


def deployed(loss, *right):
    """Of two tasks which questions are right, as digits."""
    tasks = {
        name: {
            "acc": 0.5,
            "acc_norm": 0.5,
            "acc right": digits,
            "acc_norm right": digits,
            "probability": [loss / 10] * 4,
        }
        for name, digits in zip(("one", "two"), right, strict=True)
    }
    losses = {"text": loss, "problems": loss - 1, "unlike": loss + 1}
    return {"test_loss": loss, "losses": losses, "tasks": tasks, "zeros_lost": 0, "parameters": 1000}


@pytest.fixture
def store(tmp_path):
    """Dense, pruned, and two seeds of one method; of another one seed."""
    store = Store("pretrained", tmp_path / "quality-pretrained.json")
    suite = replace(SUITE, studies=(Study("tiny", AT_2_4, FOUR),))
    store.begin(ENVIRONMENT, {"text": "wikitext.txt", "suite": described(suite)})
    store.add("base", {**COMMON, "pruning": None}, deployed(3.0, "1111", "1110"))
    store.add("base", {**COMMON, "pruning": "wanda-2:4"}, deployed(5.0, "1100", "0000"))
    runs = [("spp_positive", 0, (3.4, "1110", "1000")), ("spp_positive", 1, (3.6, "1100", "1000"))]
    for method, seed, measured in [*runs, ("masked_full", 0, (3.0, "1100", "0000"))]:
        settings = {**COMMON, "pruning": "wanda-2:4", "method": method, "options": {}, "equal": None, "seed": seed}
        if seed == 0:
            store.add("rate", {**settings, "rate": 0.1, "steps": 1}, TRAINED)
        merged = {"merged": deployed(*measured)}
        store.add("tune", {**settings, "rate": 0.1, "steps": 2}, {**TRAINED, "deployments": merged})
    return store


def test_perplexity_and_accuracy_are_over_seeds_and_questions(store):
    (one,) = comparisons_of(store)
    spp = one.find("spp_positive")
    assert spp.perplexity("text").mean == pytest.approx((math.exp(3.4) + math.exp(3.6)) / 2)
    assert one.won_back(spp, "text") == pytest.approx(0.75) and one.won_back(one.dense, "unlike") == 1.0
    # over the seeds the questions are right with 1, 1, 1/2, 0 and 1, 0, 0, 0
    assert spp.accuracy == pytest.approx((2.5 / 4 + 1 / 4) / 2)
    gain, error = spp.gain(one.pruned)
    assert gain == pytest.approx((0.5 / 4 + 1 / 4) / 2)
    # the variances of (0, 0, 1/2, 0) and (1, 0, 0, 0) are 1/16 and 1/4
    assert error == pytest.approx(math.sqrt((1 / 16) / 4 + (1 / 4) / 4) / 2)
    assert spp.probability_gain(one.pruned) == pytest.approx((0.35 - 0.5, 0.0))
    lost = (2 / 4 + 3 / 4) / 2
    assert one.tasks_won_back(spp) == pytest.approx(gain / lost)
    assert one.tasks_won_back_error(spp) == pytest.approx(error / lost)


def test_rows_stand_in_one_order_however_they_were_measured(store):
    names = [[entry.label for entry in one.entries] for one in comparisons_of(store)]
    store.records[2:] = store.records[:1:-1]
    assert names == [[entry.label for entry in one.entries] for one in comparisons_of(store)]
    assert "SPP" in names[0][0] and "Masked full" in names[0][1]


def test_the_page_says_who_is_ahead_on_which_text(store, tmp_path):
    write_pretrained(store, tmp_path / "page.md")
    page = " ".join((tmp_path / "page.md").read_text().split())
    assert "than SPP, positive start, r=16 on WikiText-2: Masked full fine-tuning. On Python docs: Masked full" in page
    assert "More accurate by over two standard errors: none. Less accurate by as much: none." in page
    assert "None of the methods changes the accuracy by more than two standard errors" in page
    assert "to tell them apart by 8 questions." in page
    assert "wins back 30% (+18.8 ± 14.0 points" in page and "(75%) |" in page and "(30 ± 22%) |" in page


def test_the_probability_of_a_choice_does_not_depend_on_its_length():
    sample = {"target": 1, "arguments": [("Q", " abcd"), ("Q", " ab")]}
    # each 1 for a character, then twice as much for the right one
    assert _probability({**sample, "filtered_resps": [(-4.0, False), (-2.0, False)]}) == pytest.approx(0.5)
    expected = math.exp(-3) / (math.exp(-3) + math.exp(-6))
    assert _probability({**sample, "filtered_resps": [(-8.0, False), (-2.0, False)]}) == pytest.approx(expected)


def test_the_page_says_what_is_missing_and_has_no_table_wider_than_six_columns(store, tmp_path):
    write_pretrained(store, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    left = page.partition("What has not been run yet")[2]
    assert "LoRA" in left and "distilled on mixed text" in left and "Masked full" not in left
    assert max(line.count("|") - 1 for line in page.splitlines() if line.startswith("|")) == 6
    assert "models together (2): 0" in page.replace("\n", " ") and (tmp_path / "quality-pretrained.png").is_file()
    store.finish()
    write_pretrained(store, tmp_path / "page.md")
    assert "not been run" not in (tmp_path / "page.md").read_text()


def test_a_page_can_be_written_before_anything_is_tuned(store, tmp_path):
    store.records = store.records[:2]
    write_pretrained(store, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "pruned, not tuned" in page and "SPP, positive start" in page.partition("What has not been run yet")[2]


def test_the_estimate_counts_what_two_studies_share_once():
    budget = replace(PRETRAINED.budget, steps=100, rate_steps=20, batch=2)
    first, again = Study("tiny", AT_2_4, (POSITIVE,)), Study("tiny", AT_2_4, (POSITIVE,), seeds=(0, 1))
    taken = Study("tiny", AT_2_4, (distilled(POSITIVE),), rates_from=AT_2_4)
    estimate = Estimate((first, again, taken), budget)
    rates = 10 * len(POSITIVE.rates)
    assert str(estimate) == f"{100 + rates + 100 + 100} steps left"
    estimate.count("a", 100, fresh=False)
    estimate.count("a", 100, fresh=False)
    assert str(estimate) == f"{rates + 200} steps left"
    estimate.count("b", rates + 200, fresh=True)
    assert re.fullmatch("0 steps left, about 0.0 hours at this pace", str(estimate))


def test_a_rate_that_a_long_run_did_not_survive_is_on_the_page(store, tmp_path):
    write_pretrained(store, tmp_path / "page.md")
    assert "too high for long ones" not in (tmp_path / "page.md").read_text()
    settings = {**COMMON, "pruning": "wanda-2:4", "method": "spp_positive", "rate": 0.02, "steps": 300}
    store.add("unstable", settings, {"max_loss": 9.35, "validation_loss": math.log(456.0)})
    write_pretrained(store, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text().replace("\n", " ")
    assert "at 0.02 on Wanda 2:4 over 300 steps" in text and "ended at 456." in text
    store.add("unstable", settings | {"rate": 0.2}, {"max_loss": None, "validation_loss": None})
    write_pretrained(store, tmp_path / "page.md")
    assert "at 0.2 on Wanda 2:4 over 300 steps: it diverged." in (tmp_path / "page.md").read_text().replace("\n", " ")


BASE = SimpleNamespace(
    fingerprint="b",
    spec=PRETRAINED.models[0],
    is_made=True,
    accelerator=SimpleNamespace(is_main_process=True),
    training=dict,
)


def test_the_lowest_rate_stays_where_its_long_run_ends_worse(tmp_path, monkeypatch):
    losses = {1e-3: 4.0, 1e-2: 5.0}
    monkeypatch.setattr(plan, "measure_rate", lambda *_, rate, **__: {"validation_loss": losses[rate]})
    monkeypatch.setattr(plan, "measure_tuned", lambda *_, **__: {"validation_loss": 6.0, "max_loss": 9.0})
    monkeypatch.setattr(plan, "measure_base", lambda *_: {"training": {}})
    study = Study("pretrained", AT_2_4, (Contender("spp", rates=(1e-3, 1e-2)),))
    store = Store("pretrained", tmp_path / "results.json")
    store.begin(ENVIRONMENT, {})
    for _ in range(2):
        with Progress(disable=True) as progress:
            plan.Session(replace(SUITE, studies=(study,)), {"pretrained": BASE}, store, progress).run()
        assert [one.settings["rate"] for one in store.records if one.kind == "tune"] == [1e-3]
        assert store.about["complete"]


def test_rates_that_are_not_measured_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "measure_base", lambda *_: {"training": {}})
    study = Study("pretrained", Pruning("wanda", 0.5), (Contender("spp"),), rates_from=AT_2_4)
    store = Store("pretrained", tmp_path / "results.json")
    store.begin(ENVIRONMENT, {})
    suite = replace(SUITE, studies=(study,))
    with Progress(disable=True) as progress, pytest.raises(ValueError, match=r"spp on Wanda 50% .* Wanda 2:4"):
        plan.Session(suite, {"pretrained": BASE}, store, progress).run()


def test_rates_of_another_pruning_are_those_of_the_same_contender(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "measure_rate", lambda *_, rate, **__: {"validation_loss": 5 + rate})
    monkeypatch.setattr(plan, "measure_tuned", lambda *_, **__: {"validation_loss": 3.0})
    monkeypatch.setattr(plan, "measure_base", lambda *_: {"training": {}})
    monkeypatch.setattr(plan.Session, "_options", lambda self, contender, base: {"share": 0.02})
    contender = Contender("supertuning", equal="parameters", rates=(1e-3, 1e-2))
    at_50 = Study("pretrained", Pruning("wanda", 0.5), (contender,), rates_from=AT_2_4)
    suite = replace(SUITE, studies=(Study("pretrained", AT_2_4, (contender,)), at_50))
    store = Store("pretrained", tmp_path / "results.json")
    store.begin(ENVIRONMENT, {})
    with Progress(disable=True) as progress:
        plan.Session(suite, {"pretrained": BASE}, store, progress).run()
    last = store.records[-1].settings
    assert (last["pruning"], last["rate"], last["equal"]) == ("wanda-0.5", 1e-3, "parameters")


def test_a_rival_at_equal_time_takes_its_rate_and_the_measured_ratio_of_the_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "measure_rate", lambda *_, rate, **__: {"validation_loss": 5 + rate})
    monkeypatch.setattr(plan, "measure_tuned", lambda *_, **__: {"validation_loss": 3.0})
    monkeypatch.setattr(plan, "measure_base", lambda *_: {"training": {}})
    profile = {"spp": {"seconds": [1.0, 2.0]}, "hira": {"seconds": [1.5, 3.0]}}
    monkeypatch.setattr(plan, "measure_steps", lambda *_: profile)
    hira = Contender("hira", rates=(1e-3, 1e-2))
    steps, tuned = Study("pretrained", AT_2_4, (hira,), steps_only=True), Study("pretrained", AT_2_4, (hira,))
    equal = Study("pretrained", AT_2_4, (replace(hira, equal="time"),))
    store = Store("pretrained", tmp_path / "results.json")
    store.begin(ENVIRONMENT, {})
    for studies in ((steps, tuned), (equal,)):
        suite = replace(SUITE, studies=studies)
        with Progress(disable=True) as progress:
            plan.Session(suite, {"pretrained": BASE}, store, progress).run()
    *_, last = store.records
    assert (last.settings["equal"], last.settings["rate"], last.settings["steps"]) == ("time", 1e-3, 200)
    assert sum(one.kind == "tune" for one in store.records) == 2


def test_a_long_run_that_ends_worse_than_its_short_one_gives_way_to_the_next_rate(tmp_path, monkeypatch):
    def measured_as(losses):
        return lambda *_, rate, **__: {"validation_loss": losses[rate], "max_loss": 1.0}

    monkeypatch.setattr(plan, "measure_rate", measured_as({1e-3: 5.0, 1e-2: 4.0, 1e-1: 3.0, 1.0: 3.5}))
    monkeypatch.setattr(plan, "measure_tuned", measured_as({1e-3: 4.5, 1e-2: 3.5, 1e-1: None}))
    monkeypatch.setattr(plan, "measure_base", lambda *_: {"training": {}})
    # what is above an unstable rate is not tried, though the best of the short runs that are left
    contender = Contender("spp", rates=(1e-3, 1e-2, 1e-1, 1.0))
    at_50 = Study("pretrained", Pruning("wanda", 0.5), (Contender("spp"),), rates_from=AT_2_4)
    suite = replace(SUITE, studies=(Study("pretrained", AT_2_4, (contender,)), at_50))
    for _ in range(2):  # the second run finds all it needs
        store = Store.open(tmp_path / "results.json", suite.name)
        store.begin(ENVIRONMENT, {})
        with Progress(disable=True) as progress:
            plan.Session(suite, {"pretrained": BASE}, store, progress).run()
        runs = [
            (one.kind, one.settings["pruning"], one.settings["rate"]) for one in store.records if one.kind != "base"
        ]
        assert runs[4:] == [
            ("unstable", "wanda-2:4", 1e-1),
            ("tune", "wanda-2:4", 1e-2),
            # at another pruning this rate is known to be too high
            ("tune", "wanda-0.5", 1e-2),
        ]


def test_a_suite_can_be_narrowed_to_some_of_its_methods_and_prunings():
    suite = narrow(PRETRAINED, ["lora", "masked_full"], ["wanda-0.5"])
    (steps,) = narrow(PRETRAINED, [], [], steps_only=True).studies
    assert steps.steps_only and not any(study.steps_only for study in narrow(PRETRAINED, ["lora"], []).studies)
    with pytest.raises(typer.BadParameter, match="no such study"):
        narrow(PRETRAINED, ["ia3"], ["sparsegpt-2:4"])
    assert {one.method for study in suite.studies for one in study.contenders} == {"lora", "masked_full"}
    assert {study.pruning.name for study in suite.studies} == {"wanda-0.5"}
    assert all(study.contenders for study in suite.studies) and narrow(PRETRAINED, [], []) == PRETRAINED
    with pytest.raises(typer.BadParameter, match=r"lora2 is not one of: .*lora"):
        narrow(PRETRAINED, ["lora", "lora2"], [])
    with pytest.raises(typer.BadParameter, match=r"wanda-4:8 is not one of: .*wanda-2:4"):
        narrow(PRETRAINED, [], ["wanda-4:8"])


def test_what_was_tuned_on_the_tasks_is_compared_separately(store, tmp_path):
    settings = {**COMMON, "pruning": "wanda-2:4", "method": "spp_positive", "equal": None, "seed": 0, "rate": 0.1}
    merged = {"merged": deployed(3.4, "1111", "1111")}
    # the most accurate and the surest of all
    merged["merged"]["tasks"]["one"]["probability"] = [0.99] * 4
    told = {**settings, "options": {"text": "questions"}, "steps": 2}
    store.add("tune", told, {**TRAINED, "deployments": merged})
    (one,) = comparisons_of(store)
    assert [entry.saw_tasks for entry in one.entries] == [False, True, False]
    write_pretrained(store, tmp_path / "page.md")
    page = " ".join((tmp_path / "page.md").read_text().split())
    told = "SPP, positive start, r=16 (tuned on the tasks' training parts)"
    assert "in the tuning text, of the accuracy comes back: 120% (SPP, positive start, r=16)." in page
    # its row and its rate
    assert page.count(told) == 2


def test_what_is_won_back_is_of_the_same_copy_of_the_pruned_model(store, tmp_path):
    write_pretrained(store, tmp_path / "page.md")
    assert "†" not in (tmp_path / "page.md").read_text()
    store.begin({**ENVIRONMENT, "hardware": {**ENVIRONMENT["hardware"], "cpu": "Another"}}, store.about)
    copy = {**COMMON, "pruning": "wanda-2:4", "weights": "abc"}
    store.add("base", copy, deployed(7.0, "1000", "0000"))
    for method, right in (("spp_positive", "1110"), ("lora", "1111")):
        settings = {**copy, "method": method, "options": {}, "equal": None, "seed": 0, "rate": 1, "steps": 2}
        store.add("tune", settings, {**TRAINED, "deployments": {"merged": deployed(4.0, right, "0000")}})
    seconds = {name: {"seconds": [1.0], "bytes": 8} for name in ("spp", "lora")}
    store.add("profile", {**COMMON, "contenders": ["lora", "spp"]}, seconds)
    first, other = comparisons_of(store)
    assert [one.label for one in (first, other)] == ["Wanda 2:4", "Wanda 2:4 †"]
    assert [entry.settings["method"] for entry in other.entries] == ["spp_positive", "lora"]
    # from 7 to 4, of 7 to 3
    assert other.won_back(other.find("lora"), "text") == pytest.approx(0.75)
    write_pretrained(store, tmp_path / "page.md")
    page = " ".join((tmp_path / "page.md").read_text().split())
    assert "pruned, not tuned † |" in page and "start, r=16** † |" in page and "dense † |" not in page
    lora = next(line for line in (tmp_path / "page.md").read_text().splitlines() if "LoRA, r=16 (merged) †" in line)
    assert lora.endswith("| -12.5 ± 12.5 |")  # one of the four questions of one of the two tasks
    assert "on Another (AVX2), the first on CPU (AVX2)." in page
    assert "SPP, positive start, r=16 wins back 75% / 75% / 30 ± 22% on the first and 75% / 75% / " in page


def test_another_machine_measures_its_own_copy_and_the_reference_on_it(tmp_path, monkeypatch):
    """Resumed elsewhere, what is done stays done, and what is left is compared with SPP on the same copy."""
    monkeypatch.setattr(plan, "measure_rate", lambda *_, rate, **__: {"validation_loss": 5 + rate})
    monkeypatch.setattr(plan, "measure_tuned", lambda *_, **__: {"validation_loss": 3.0})
    monkeypatch.setattr(plan, "measure_base", lambda *_: {"training": {}})
    suite = replace(PRETRAINED, studies=(Study("pretrained", AT_2_4, (POSITIVE, SPP)),))
    later = replace(suite, studies=(*suite.studies, Study("pretrained", AT_2_4, (IA3, MASKED_LORA))))
    store = Store("pretrained", tmp_path / "results.json")
    for weights, some in (("here", suite), ("there", suite), ("there", later)):
        store.begin(ENVIRONMENT, {})
        base = SimpleNamespace(**{**vars(BASE), "weights_id": lambda pruning, weights=weights: weights})
        with Progress(disable=True) as progress:
            plan.Session(some, {"pretrained": base}, store, progress).run()
    found = [(one.kind, one.settings.get("method"), one.settings.get("weights")) for one in store.records]
    assert [one for one in found if one[0] == "tune"] == [
        ("tune", "spp", "here"),
        ("tune", "spp_positive", "here"),
        ("tune", "spp", "there"),
        ("tune", "ia3", "there"),
        ("tune", "masked_lora", "there"),
    ]
    assert [one[2] for one in found if one[0] == "base"] == [None, "here", "there"]
    # rates do not depend on the copy
    assert [one[1:] for one in found if one[0] == "rate"].count(("spp", None)) == len(SPP.rates)


def test_questions_are_written_as_the_tasks_ask_them(tmp_path):
    row = {"question": "Why?", "choices": ["a", "b"], "answer": 1}
    for name in ("arc_easy", "openbookqa"):
        for part in ("train", "test"):
            (tmp_path / f"{name}_{part}.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "text.txt").write_text("\n\n".join(f"Paragraph {n}. {'word ' * 300}" for n in range(30)))
    assert load_texts(tmp_path, seed=0).questions == ("Question: Why?\nAnswer: b", "Why? b")
    write_tasks(tmp_path, tmp_path / "tasks")
    assert 'doc_to_text: "Question: {{question}}\\nAnswer:"' in (tmp_path / "tasks" / "arc_easy.yaml").read_text()
    assert 'doc_to_text: "{{question}}"' in (tmp_path / "tasks" / "openbookqa.yaml").read_text()


def test_results_are_of_one_set_of_questions(tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(f"Paragraph {n}. {'word ' * 300}" for n in range(30)))
    found = []
    for part, answer in (("train", 0), ("train", 1), ("test", 1)):
        row = {"question": "Why?", "choices": ["a", "b"], "answer": answer}
        (tmp_path / f"arc_easy_{part}.jsonl").write_text(json.dumps(row) + "\n")
        found.append(load_texts(tmp_path, seed=0).questions_id)
    assert len(set(found)) == 3
    own, other = (Store("pretrained", tmp_path / f"{name}.json") for name in ("own", "other"))
    own.begin(ENVIRONMENT, {"questions": found[0]})
    own.begin(ENVIRONMENT, {"questions": found[0]})
    other.begin(ENVIRONMENT, {"questions": found[1]})
    with pytest.raises(ValueError, match=r"This run asks other questions than .*own\.json has answers to"):
        own.begin(ENVIRONMENT, {"questions": found[1]})
    with pytest.raises(ValueError, match=r"other\.json asks other questions"):
        own.take(other)


def test_tasks_are_made_of_the_files_with_choices_alone(tmp_path):
    (tmp_path / "gsm8k_test.jsonl").write_text('{"question": "How many?", "answer": "#### 2"}\n')
    (tmp_path / "arc_easy_test.jsonl").write_text('{"question": "Why?", "choices": ["a", "b"], "answer": 1}\n')
    assert write_tasks(tmp_path, tmp_path / "tasks") == ("arc_easy",)
    task = (tmp_path / "tasks" / "arc_easy.yaml").read_text()
    assert 'doc_to_text: "Question: {{question}}\\nAnswer:"' in task


def test_no_folder_of_the_machine_is_in_the_description(tmp_path):
    suite = replace(PRETRAINED, models=(replace(PRETRAINED.models[0], name="tiny", source=str(tmp_path)),))
    budget = replace(suite.budget, task_folder=str(tmp_path))
    assert str(tmp_path.parent) not in str(described(replace(suite, budget=budget)))
    assert str(tmp_path.parent) in str(asdict(suite))
