# SPDX-License-Identifier: Apache-2.0
import gc
import json
import re
import time
from functools import partial

import pytest
import torch
import typer

from benchmarks.harness import (
    BenchmarkResult,
    Case,
    Contestant,
    Rounds,
    contestants_that_fit,
    describe_environment,
    measure_interleaved,
    ratio_summary,
    repeated,
    repetitions_for,
    result_path,
    summarize,
)
from benchmarks.harness import options as opt
from benchmarks.harness.environment import machine_slug
from benchmarks.harness.memory import record_saved_tensors, storage_bytes, trace_memory
from benchmarks.harness.tables import make_console, print_table


CPU = torch.device("cpu")


def logging_contestants(log, names="abc"):
    return [Contestant(n, partial(log.append, n), partial(log.append, f"prepare {n}")) for n in names]


def test_every_round_runs_every_contestant_once_after_its_preparation():
    log = []
    samples = measure_interleaved(logging_contestants(log), CPU, Rounds(exact=10, warmup=2))
    assert {name: len(times) for name, times in samples.items()} == {"a": 10, "b": 10, "c": 10}
    assert log[::2] == [f"prepare {name}" for name in log[1::2]]
    rounds = [tuple(log[1::2][start : start + 3]) for start in range(0, 36, 3)]
    assert len(rounds) == 12
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 3  # of 6 orders


def test_the_seed_fixes_the_orders():
    logs = [[], [], []]
    for log, seed in zip(logs, (1, 1, 2), strict=True):
        measure_interleaved(logging_contestants(log), CPU, Rounds(exact=4), seed)
    assert logs[0] == logs[1] != logs[2]


def test_the_garbage_collector_is_off_in_timed_spans_and_back_on_after():
    seen = []
    measure_interleaved([Contestant("a", lambda: seen.append(gc.isenabled()))], CPU, Rounds(exact=2))
    assert not any(seen) and gc.isenabled()


def test_times_are_those_of_the_calls():
    samples = measure_interleaved([Contestant("a", lambda: time.sleep(0.01))], CPU, Rounds(exact=2))
    assert min(samples["a"]) >= 0.01


@pytest.mark.parametrize(("seconds_per_round", "expected"), [(100.0, 3), (10.0, 4), (4.0, 10), (0.001, 25), (0.0, 25)])
def test_rounds_fit_the_time_within_bounds(seconds_per_round, expected):
    assert Rounds(seconds=40.0, minimum=3, maximum=25).count(seconds_per_round) == expected
    assert Rounds(seconds=40.0, minimum=3, maximum=25, exact=7).count(seconds_per_round) == 7


def test_repetitions_make_a_sample_long_enough():
    def call():
        time.sleep(0.001)

    repetitions = repetitions_for(call, CPU, 0.008)
    assert repetitions in (1, 2, 4, 8)
    count = []
    repeated(Contestant("a", lambda: count.append(1)), 5).run()
    assert len(count) == 5


def test_nothing_is_left_out_on_cpu():
    log = []
    contestants = logging_contestants(log)
    assert contestants_that_fit(contestants, CPU) == (contestants, [])
    assert not log


def test_a_summary_has_median_quartiles_and_extremes():
    summary = summarize([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (summary.minimum, summary.lower_quartile, summary.median, summary.upper_quartile, summary.maximum) == (
        (1.0, 2.0, 3.0, 4.0, 5.0)
    )
    assert summary.count == 5
    assert summarize([7.0]).lower_quartile == summarize([7.0]).upper_quartile == 7.0
    with pytest.raises(ValueError, match="no samples"):
        summarize([])


def test_ratios_are_taken_within_a_round():
    samples = {"reference": [1.0, 10.0, 100.0], "other": [2.0, 20.0, 200.0]}
    assert ratio_summary(samples, "other", "reference").maximum == 2.0
    assert ratio_summary(samples, "other", "reference").minimum == 2.0


def a_result():
    case = Case({"tokens": 8}, {"lora": [1.0, 2.0], "spp": [2.0, 3.0]}, {"spp": {"bytes": 4.0}})
    return BenchmarkResult("layer", "lora", {"seed": 0}, describe_environment(CPU), [case])


def test_results_come_back_from_json(tmp_path):
    path = tmp_path / "new" / "layer.json"
    a_result().save(path)
    assert BenchmarkResult.load(path, "layer") == a_result_with(json.loads(path.read_text())["environment"])
    written = json.loads(path.read_text())["cases"][0]
    assert written["samples"] == {"lora": [1.0, 2.0], "spp": [2.0, 3.0]}
    assert written["summaries"]["spp"]["median"] == 2.5
    assert written["ratios"]["spp"]["median"] == 1.75


def a_result_with(environment):
    result = a_result()
    result.environment = environment
    return result


def test_a_case_without_the_reference_has_no_ratios(tmp_path):
    result = a_result()
    del result.cases[0].samples["lora"]
    result.save(tmp_path / "layer.json")
    assert "ratios" not in json.loads((tmp_path / "layer.json").read_text())["cases"][0]


def test_the_result_of_another_benchmark_is_refused(tmp_path):
    path = tmp_path / "layer.json"
    a_result().save(path)
    with pytest.raises(ValueError, match="'decode'"):
        BenchmarkResult.load(path, "decode")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match=r"list\.json"):
        BenchmarkResult.load(tmp_path / "list.json", "decode")


def test_a_quick_run_does_not_replace_a_measurement(tmp_path):
    assert result_path(tmp_path, "box", "layer") == tmp_path / "box" / "layer.json"
    assert result_path(tmp_path, "box", "layer", quick=True) != result_path(tmp_path, "box", "layer")


def test_the_environment_is_described():
    environment = json.loads(json.dumps(describe_environment(CPU)))
    assert environment["versions"]["torch"] == torch.__version__
    assert {"python", "peft", "transformers", "peft-spp"} <= environment["versions"].keys()
    assert environment["threads"]["torch"] == torch.get_num_threads()
    assert environment["hardware"]["cpu"] and environment["hardware"]["cores_used"] >= 1
    assert environment["hardware"]["memory_bytes"] > 2**28
    assert environment["hardware"]["gpu"] is None
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", environment["date"])
    assert environment["command"].startswith("python ")
    assert environment["git"]["commit"] is None or re.fullmatch(r"[0-9a-f]{40}", environment["git"]["commit"])


def test_the_machine_is_named_after_its_cpu():
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", machine_slug(CPU))


def test_a_table_is_markdown_however_narrow_the_terminal(capsys):
    console = make_console()
    console.width = 20
    print_table(console, ["method", "milliseconds"], [["a method with a long name", "1.0"], ["b", "123.0"]])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line] == [
        ["method", "milliseconds"],
        ["a method with a long name", "1.0"],
        ["b", "123.0"],
    ]


def test_choices_come_once_each_and_unknown_ones_are_named():
    known = {"lora": 1, "spp": 2, "hira": 3}
    assert opt.choose("--competitor", ["spp", "lora", "spp"], known, required="lora") == [2, 1]
    with pytest.raises(typer.BadParameter, match=r"'dora'.*lora, spp, hira"):
        opt.choose("--competitor", ["dora"], known)
    with pytest.raises(typer.BadParameter, match="'lora'"):
        opt.choose("--competitor", ["spp"], known, required="lora")


def test_shapes_are_parsed():
    assert opt.parse_shapes(["11008x4096", "8x4"]) == [(11008, 4096), (8, 4)]
    for wrong in ("4096", "0x4", "4x4x4", "axb"):
        with pytest.raises(typer.BadParameter, match=wrong):
            opt.parse_shapes([wrong])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_an_error(tmp_path):
    with pytest.raises(typer.BadParameter, match="CUDA"):
        opt.start_run("layer", opt.Device.cuda, None, tmp_path, None, False)


def test_a_machine_must_be_a_folder_name(tmp_path):
    with pytest.raises(typer.BadParameter, match="a/b"):
        opt.start_run("layer", opt.Device.cpu, "a/b", tmp_path, None, False)


def test_peak_and_end_of_a_call_are_exact():
    def call():
        a = torch.ones(1000, 1000)
        b = a + a
        del a
        return b * b

    # a scalar or two of a few bytes come with the operations
    trace = trace_memory(call, CPU)
    assert 8_000_000 <= trace.peak < 8_001_000
    assert trace.end == trace.result.nbytes == 4_000_000


def test_a_backward_pass_is_traced():
    weight = torch.ones(500, 500, requires_grad=True)
    trace = trace_memory(lambda: (weight * 2).sum().backward(), CPU)
    # the product is gone when its gradient, an expanded scalar, is multiplied
    assert 1_000_000 <= trace.peak < 2_001_000
    assert 1_000_000 <= trace.end < 1_001_000


class SavesTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, x[1:], x * 2, weight)
        return x * 3

    @staticmethod
    def backward(ctx, grad):
        return grad * 3, None


def test_saved_tensors_count_once_a_storage_without_the_models_own():
    x = torch.ones(10, 10, requires_grad=True)
    weight = torch.nn.Parameter(torch.ones(10, 10))
    with record_saved_tensors([weight]) as saved:
        y = SavesTwice.apply(x, weight).exp()
        total = saved.total
    # x with its slice, x * 2, and the output of exp
    assert total == 3 * 400
    assert y.shape == (10, 10)


def test_storages_count_once():
    x = torch.ones(10)
    assert storage_bytes([x, x[2:], x.view(5, 2), torch.ones(3), torch.ones(0)]) == 52
