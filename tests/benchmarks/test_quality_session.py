# SPDX-License-Identifier: Apache-2.0
"""What a session of the quality benchmark runs, with measurements that are made up."""

import re
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import typer
from rich.progress import Progress


pytest.importorskip("datasets")

from benchmarks.quality import plan
from benchmarks.quality.__main__ import described, narrow
from benchmarks.quality.design import Contender, Pruning, Study
from benchmarks.quality.estimate import Estimate
from benchmarks.quality.pretrained.suite import IA3, MASKED_LORA, POSITIVE, PRETRAINED, SPP, distilled
from benchmarks.quality.store import Store
from benchmarks.quality.suites import AT_2_4


SUITE = replace(PRETRAINED, reference=None)
BASE = SimpleNamespace(
    fingerprint="b",
    spec=PRETRAINED.models[0],
    is_made=True,
    accelerator=SimpleNamespace(is_main_process=True),
    training=dict,
)


@pytest.fixture(autouse=True)
def made_up(monkeypatch):
    """A loss that grows with the rate, and long runs that end well."""
    monkeypatch.setattr(plan, "measure_base", lambda *_: {"training": {}})
    monkeypatch.setattr(plan, "measure_rate", lambda *_, rate, **__: {"validation_loss": 5 + rate})
    monkeypatch.setattr(plan, "measure_tuned", lambda *_, **__: {"validation_loss": 3.0})


def run(suite, store, base=BASE):
    store.begin({}, {})
    with Progress(disable=True) as progress:
        plan.Session(suite, {"pretrained": base}, store, progress).run()


@pytest.fixture
def store(tmp_path):
    return Store("pretrained", tmp_path / "results.json")


def test_the_lowest_rate_stays_where_its_long_run_ends_worse(store, monkeypatch):
    losses = {1e-3: 4.0, 1e-2: 5.0}
    monkeypatch.setattr(plan, "measure_rate", lambda *_, rate, **__: {"validation_loss": losses[rate]})
    monkeypatch.setattr(plan, "measure_tuned", lambda *_, **__: {"validation_loss": 6.0, "max_loss": 9.0})
    study = Study("pretrained", AT_2_4, (Contender("spp", rates=(1e-3, 1e-2)),))
    for _ in range(2):
        run(replace(SUITE, studies=(study,)), store)
        assert [one.settings["rate"] for one in store.records if one.kind == "tune"] == [1e-3]
        assert store.about["complete"]


def test_rates_that_are_not_measured_are_named(store):
    study = Study("pretrained", Pruning("wanda", 0.5), (Contender("spp"),), rates_from=AT_2_4)
    suite = replace(SUITE, studies=(study,))
    with pytest.raises(ValueError, match=r"spp on Wanda 50% .* Wanda 2:4"):
        run(suite, store)


def test_rates_of_another_pruning_are_those_of_the_same_contender(store, monkeypatch):
    monkeypatch.setattr(plan.Session, "_options", lambda self, contender, base: {"share": 0.02})
    contender = Contender("supertuning", equal="parameters", rates=(1e-3, 1e-2))
    at_50 = Study("pretrained", Pruning("wanda", 0.5), (contender,), rates_from=AT_2_4)
    suite = replace(SUITE, studies=(Study("pretrained", AT_2_4, (contender,)), at_50))
    run(suite, store)
    last = store.records[-1].settings
    assert (last["pruning"], last["rate"], last["equal"]) == ("wanda-0.5", 1e-3, "parameters")


def test_a_rival_at_equal_time_takes_its_rate_and_the_measured_ratio_of_the_steps(store, monkeypatch):
    profile = {"spp": {"seconds": [1.0, 2.0]}, "hira": {"seconds": [1.5, 3.0]}}
    monkeypatch.setattr(plan, "measure_steps", lambda *_: profile)
    hira = Contender("hira", rates=(1e-3, 1e-2))
    steps, tuned = Study("pretrained", AT_2_4, (hira,), steps_only=True), Study("pretrained", AT_2_4, (hira,))
    equal = Study("pretrained", AT_2_4, (replace(hira, equal="time"),))
    for studies in ((steps, tuned), (equal,)):
        run(replace(SUITE, studies=studies), store)
    *_, last = store.records
    assert (last.settings["equal"], last.settings["rate"], last.settings["steps"]) == ("time", 1e-3, 200)
    assert sum(one.kind == "tune" for one in store.records) == 2


def test_a_long_run_that_ends_worse_than_its_short_one_gives_way_to_the_next_rate(tmp_path, monkeypatch):
    def measured_as(losses):
        return lambda *_, rate, **__: {"validation_loss": losses[rate], "max_loss": 1.0}

    monkeypatch.setattr(plan, "measure_rate", measured_as({1e-3: 5.0, 1e-2: 4.0, 1e-1: 3.0, 1.0: 3.5}))
    monkeypatch.setattr(plan, "measure_tuned", measured_as({1e-3: 4.5, 1e-2: 3.5, 1e-1: None}))
    # what is above an unstable rate is not tried, though the best of the short runs that are left
    contender = Contender("spp", rates=(1e-3, 1e-2, 1e-1, 1.0))
    at_50 = Study("pretrained", Pruning("wanda", 0.5), (Contender("spp"),), rates_from=AT_2_4)
    suite = replace(SUITE, studies=(Study("pretrained", AT_2_4, (contender,)), at_50))
    for _ in range(2):  # the second run finds all it needs
        store = Store.open(tmp_path / "results.json", suite.name)
        run(suite, store)
        runs = [
            (one.kind, one.settings["pruning"], one.settings["rate"]) for one in store.records if one.kind != "base"
        ]
        assert runs[4:] == [
            ("unstable", "wanda-2:4", 1e-1),
            ("tune", "wanda-2:4", 1e-2),
            # at another pruning this rate is known to be too high
            ("tune", "wanda-0.5", 1e-2),
        ]


def test_another_machine_measures_its_own_copy_and_the_reference_on_it(store):
    """Resumed elsewhere, what is done stays done, and what is left is compared with SPP on the same copy."""
    suite = replace(PRETRAINED, studies=(Study("pretrained", AT_2_4, (POSITIVE, SPP)),))
    later = replace(suite, studies=(*suite.studies, Study("pretrained", AT_2_4, (IA3, MASKED_LORA))))
    for weights, some in (("here", suite), ("there", suite), ("there", later)):
        base = SimpleNamespace(**{**vars(BASE), "weights_id": lambda pruning, weights=weights: weights})
        run(some, store, base)
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


def test_no_folder_of_the_machine_is_in_the_description(tmp_path):
    suite = replace(PRETRAINED, models=(replace(PRETRAINED.models[0], name="tiny", source=str(tmp_path)),))
    budget = replace(suite.budget, task_folder=str(tmp_path))
    assert str(tmp_path.parent) not in str(described(replace(suite, budget=budget)))
    assert str(tmp_path.parent) in str(asdict(suite))
