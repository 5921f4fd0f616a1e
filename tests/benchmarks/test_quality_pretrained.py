# SPDX-License-Identifier: Apache-2.0
"""What the suite of a pretrained model says of made-up results."""

import math
import re
import statistics
from dataclasses import replace

import pytest


pytest.importorskip("datasets")

from benchmarks.quality.__main__ import described
from benchmarks.quality.design import Study
from benchmarks.quality.pretrained.page import write_pretrained
from benchmarks.quality.pretrained.results import comparisons_of
from benchmarks.quality.pretrained.suite import FOUR, PRETRAINED
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


def test_the_spread_over_seeds_is_told_for_rows_of_one_seed(store, tmp_path):
    write_pretrained(store, tmp_path / "page.md")
    page = " ".join((tmp_path / "page.md").read_text().split())
    own = [math.exp(3.4), math.exp(3.6)]
    relative = statistics.stdev(own) / statistics.fmean(own)
    assert (
        f"rows with several seeds (1) its root mean square is {relative:.1%} on WikiText-2, {relative:.1%} on GSM8K"
        in page
    )
    store.records = [one for one in store.records if one.settings.get("seed") != 1]
    write_pretrained(store, tmp_path / "page.md")
    assert "with several seeds" not in " ".join((tmp_path / "page.md").read_text().split())


def test_a_rate_that_gave_way_to_a_better_one_has_a_row_of_its_own(store, tmp_path):
    settings = {**COMMON, "pruning": "wanda-2:4", "method": "spp_positive", "options": {}, "equal": None, "seed": 0}
    store.add("rate", {**settings, "rate": 0.2, "steps": 1}, {**TRAINED, "validation_loss": 2.5})
    merged = {"merged": deployed(3.2, "1110", "1100")}
    store.add("tune", {**settings, "rate": 0.2, "steps": 2}, {**TRAINED, "deployments": merged})
    (one,) = comparisons_of(store)
    labels = [entry.label for entry in one.entries]
    assert labels[:2] == ["SPP, positive start, r=16", "SPP, positive start, r=16, rate 0.1"]
    assert one.find("spp_positive").settings["rate"] == 0.2 and len(one.entries[1].deployed) == 2
    write_pretrained(store, tmp_path / "page.md")
    assert "0.1: 20.09, **0.2: 12.18** (edge)" in (tmp_path / "page.md").read_text()


def test_at_a_pruning_that_takes_the_rates_of_another_a_rate_gives_way_too(store):
    contender = {**COMMON, "method": "spp_positive", "options": {}, "equal": None, "seed": 0}
    store.add("base", {**COMMON, "pruning": "wanda-0.5"}, deployed(4.0, "1100", "1000"))
    store.add(
        "rate", {**contender, "pruning": "wanda-2:4", "rate": 0.2, "steps": 1}, {**TRAINED, "validation_loss": 2.5}
    )
    for rate in (0.1, 0.2):
        merged = {"merged": deployed(3.0 + rate, "1110", "1100")}
        settings = {**contender, "pruning": "wanda-0.5", "rate": rate, "steps": 2}
        store.add("tune", settings, {**TRAINED, "deployments": merged})
    at_50 = comparisons_of(store)[1]
    assert [one.label for one in at_50.entries] == [
        "SPP, positive start, r=16",
        "SPP, positive start, r=16, rate 0.1",
    ]
    assert at_50.find("spp_positive").settings["rate"] == 0.2 and not at_50.entries[0].rates


def test_rows_stand_in_one_order_however_they_were_measured(store):
    names = [[entry.label for entry in one.entries] for one in comparisons_of(store)]
    store.records[2:] = store.records[:1:-1]
    assert names == [[entry.label for entry in one.entries] for one in comparisons_of(store)]
    assert "SPP" in names[0][0] and "Masked full" in names[0][1]


def test_the_page_says_who_is_ahead_on_which_text(store, tmp_path):
    write_pretrained(store, tmp_path / "page.md")
    page = " ".join((tmp_path / "page.md").read_text().split())
    assert "Of the other methods that keep the zeros (1 at Wanda 2:4), the accuracy of none differs from SPP's" in page
    assert "On Python docs alone: none. On both: Masked full fine-tuning." in page
    assert "More accurate by over two standard errors: none. Less accurate by as much: none." in page
    assert "two standard errors of SPP's lead are at least 28.0 points, 45% of what pruning took." in page
    assert "None of the methods changes the accuracy by more than two standard errors" in page
    assert "to tell them apart by 8 questions." in page
    assert re.search(r"\| Wanda 2:4 \| 62\.5 ± [\d.]+ \| 30 ± 22% \| 75% \| 75% \| – \|", page)
    assert "8 questions do not show that SPP raises the accuracy at Wanda 2:4." in page
    assert "SPP wins back 75% on WikiText-2" in page and "and 75% on Python docs" in page
    assert "(75%) |" in page and "(30 ± 22%) |" in page


def test_the_page_says_what_is_missing_and_has_no_table_wider_than_six_columns(store, tmp_path):
    write_pretrained(store, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    left = page.partition("What has not been run yet")[2]
    assert "LoRA" in left and "distilled on mixed text" in left and "Masked full" not in left
    assert max(line.count("|") - 1 for line in page.splitlines() if line.startswith("|")) == 6
    assert "SPP's 2 tuned models kept every zero." in " ".join(page.split())
    assert (tmp_path / "quality-pretrained.png").is_file()
    store.finish()
    write_pretrained(store, tmp_path / "page.md")
    assert "not been run" not in (tmp_path / "page.md").read_text()


def test_a_page_can_be_written_before_anything_is_tuned(store, tmp_path):
    store.records = store.records[:2]
    write_pretrained(store, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "pruned, not tuned" in page and "SPP, positive start" in page.partition("What has not been run yet")[2]


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
    assert "training questions as half of the tuning text win back 120 ± " in page
    assert (
        "on the same text SPP and they win back 0% to 30% of the accuracy, and SPP 120% with the tasks' questions"
        in page
    )
    # its row; it is not compared with those that saw no question
    assert page.count(told) == 1


def test_what_is_won_back_is_of_the_same_copy_of_the_pruned_model(store, tmp_path):
    write_pretrained(store, tmp_path / "page.md")
    assert "†" not in (tmp_path / "page.md").read_text()
    store.begin({**ENVIRONMENT, "hardware": {**ENVIRONMENT["hardware"], "cpu": "Another"}}, store.about)
    copy = {**COMMON, "pruning": "wanda-2:4", "weights": "abc"}
    store.add("base", copy, deployed(7.0, "1000", "0000"))
    for method, right in (("spp_positive", "1110"), ("lora", "1111")):
        settings = {**copy, "method": method, "options": {}, "equal": None, "seed": 0, "rate": 0.1, "steps": 2}
        store.add("tune", settings, {**TRAINED, "deployments": {"merged": deployed(4.0, right, "0000")}})
    seconds = {name: {"seconds": [1.0], "bytes": 8} for name in ("spp", "lora")}
    store.add("profile", {**COMMON, "contenders": ["lora", "spp"]}, seconds)
    first, other = comparisons_of(store)
    assert [one.label for one in (first, other)] == ["Wanda 2:4", "Wanda 2:4 †"]
    assert [entry.settings["method"] for entry in other.entries] == ["spp_positive", "lora"]
    # from 7 to 4, of 7 to 3
    assert other.won_back(other.find("lora"), "text") == pytest.approx(0.75)
    write_pretrained(store, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    own, _, its = text.partition("\n### Wanda 2:4 †\n")
    page, its = " ".join(text.split()), its.partition("\n## ")[0]
    # the first copy's LoRA is among what has not been run
    assert "LoRA, r=16 (merged)" not in own
    (lora,) = [line for line in its.splitlines() if line.startswith("| LoRA, r=16 (merged) |")]
    assert lora.endswith("| -12.5 ± 12.5 |")  # one of the four questions of one of the two tasks
    assert "on Another (AVX2), the first on CPU (AVX2)." in page
    assert "SPP, positive start, r=16 wins back 75% / 75% / 30 ± 22% on the first and 75% / 75% / " in page
