# SPDX-License-Identifier: Apache-2.0
"""Every benchmark runs at tiny size, and its picture can be drawn again from its JSON."""

import json

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import (
    compressed_layers,
    compressed_models,
    decode,
    dense_tokens,
    layer,
    mask_record,
    memory,
    other_layers,
    passes,
    step_profile,
    training_step,
)
from benchmarks.competitors import COMPETITORS
from peft_spp.functional.kernels.cpu import bitmask


PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
MODULES = {module.NAME: module for module in (layer, training_step, memory, decode)}
FEW = ["--competitor", "base", "--competitor", "lora", "--competitor", "spp"]


def run(module, *arguments):
    return CliRunner().invoke(module.app, list(arguments))


def quick(module, folder, *arguments):
    outcome = run(module, "--quick", "--machine", "box", "--output-dir", str(folder), *arguments)
    assert outcome.exit_code == 0, outcome.output
    path = folder / "box" / f"{module.NAME}-quick.json"
    return json.loads(path.read_text()), path, outcome.output


def test_layer(tmp_path):
    result, path, output = quick(layer, tmp_path, "--precision", "fp32", "--precision", "bf16-autocast")
    assert [case["parameters"]["precision"] for case in result["cases"]] == ["fp32", "bf16-autocast"]
    for case in result["cases"]:
        assert set(case["samples"]) == {"matmuls", *layer.MAIN_COMPETITORS}
        assert all(len(samples) == 2 and min(samples) > 0 for samples in case["samples"].values())
        assert case["ratios"]["lora"]["median"] == 1.0
        floor, own = case["samples"]["matmuls"], case["samples"]["spp"]
        shares = [1 - f / o for f, o in zip(floor, own, strict=True)]
        assert case["values"]["spp"]["share_beyond_matmuls"] == pytest.approx(sum(shares) / 2)
    assert path.with_suffix(".png").read_bytes().startswith(PNG_SIGNATURE)
    assert "| LoRA, r=16" in output


def test_training_step(tmp_path):
    result, path, _ = quick(training_step, tmp_path, "--precision", "bf16")
    assert [case["parameters"]["checkpointing"] for case in result["cases"]] == [False, True]
    assert all(set(case["samples"]) == set(COMPETITORS) - {"spp_compressed"} for case in result["cases"])
    assert result["settings"]["size"]["parameters"] > 0
    assert path.with_suffix(".png").read_bytes().startswith(PNG_SIGNATURE)


def test_step_profile(tmp_path):
    result, _, output = quick(step_profile, tmp_path, "--precision", "fp32")
    (case,) = result["cases"]
    assert list(case["values"]) == step_profile.MAIN_COMPETITORS
    for name, values in case["values"].items():
        assert set(values) == set(result["settings"]["kinds"])
        assert min(values["matmuls"], values["attention"], values[step_profile.OTHER]) > 0
        assert (values["passes over W"] > 0) == (name == "spp")
    assert "passes over W, s" in output


def test_memory(tmp_path):
    competitors = ["base", "lora", "hira", "masked_full", "spp_authors_repeat", "spp"]
    chosen = [argument for name in competitors for argument in ("--competitor", name)]
    result, path, _ = quick(memory, tmp_path, "--precision", "fp32", *chosen)
    off, on = result["cases"]
    assert (off["parameters"]["checkpointing"], on["parameters"]["checkpointing"]) == (False, True)
    # what is kept besides: the loss; with checkpointing also a random number generator's state of 5 kB for each block
    for case, besides in ((off, 256), (on, 12_000)):
        assert list(case["values"]) == competitors
        for values in case["values"].values():
            assert values["saved_bytes"] < values["kept_bytes"] < values["saved_bytes"] + besides
            assert values["peak_bytes"] > values["static_bytes"] + values["kept_bytes"]
    for name, values in off["values"].items():
        assert on["values"][name]["saved_bytes"] < values["saved_bytes"]
        assert on["values"][name]["static_bytes"] == values["static_bytes"]
    # SPP keeps nothing next to the inputs of the layers; HiRA keeps two tensors of the weight's size
    assert (
        off["values"]["spp"]["saved_bytes"]
        <= off["values"]["lora"]["saved_bytes"]
        < off["values"]["hira"]["saved_bytes"]
    )
    assert path.with_suffix(".png").read_bytes().startswith(PNG_SIGNATURE)


def test_memory_is_the_same_in_every_run(tmp_path):
    arguments = ["--precision", "bf16", "--checkpointing", "off", *FEW]
    first, second = (quick(memory, tmp_path / name, *arguments)[0]["cases"] for name in ("first", "second"))
    assert first == second


def test_decode(tmp_path):
    result, path, _ = quick(decode, tmp_path)
    assert result["reference"] == "base"
    assert [case["parameters"]["tokens"] for case in result["cases"]] == [1, 2, 1, 2]
    for case in result["cases"]:
        m, n = case["parameters"]["shape"]
        size = 4 if case["parameters"]["precision"] == "fp32" else 2
        assert case["parameters"]["distinct_weights"] * m * n * size >= result["settings"]["working_set_bytes"]
        assert set(case["samples"]) == set(decode.MAIN_COMPETITORS)
    assert path.with_suffix(".png").read_bytes().startswith(PNG_SIGNATURE)


def test_mask_record(tmp_path):
    outcome = run(mask_record, "--quick", "--machine", "box", "--output-dir", str(tmp_path))
    assert outcome.exit_code == 0, outcome.output
    result = json.loads((tmp_path / "box" / "mask_record-quick.json").read_text())
    assert [(case["parameters"]["dtype"], case["parameters"]["layout"]) for case in result["cases"]] == [
        (dtype, layout) for dtype in mask_record.DTYPES for layout in mask_record.LAYOUTS
    ]
    rows, columns = result["settings"]["shape"]
    for case in result["cases"]:
        seconds = case["summaries"]["record"]["median"] / (rows * columns) * 6_476_005_376
        assert case["values"]["record"]["seconds_llama_7b"] == pytest.approx(seconds)
    assert run(mask_record, "--shape", "30").exit_code == 2


def test_passes(tmp_path):
    result, _, output = quick(passes, tmp_path)
    assert [case["parameters"]["precision"] for case in result["cases"]] == passes.MAIN_PRECISIONS
    for case in result["cases"]:
        bytes_moved = 2 * 32 * 16 * (4 if case["parameters"]["precision"] == "fp32" else 2)
        for name in passes.LABELS:
            speed = bytes_moved / case["summaries"][name]["median"] / 1e9
            assert case["values"][name]["gb_per_second"] == pytest.approx(speed)
            assert passes.LABELS[name] in output


@pytest.mark.parametrize("name", MODULES)
def test_a_picture_is_drawn_again_from_the_json_alone(name, tmp_path):
    module = MODULES[name]
    few = FEW + (["--checkpointing", "off"] if name in ("memory", "training_step") else [])
    _, path, _ = quick(module, tmp_path, "--precision", "fp32", *few)
    before = path.read_text()
    path.with_suffix(".png").unlink()
    assert run(module, "--plot-only", str(path)).exit_code == 0
    assert path.with_suffix(".png").read_bytes().startswith(PNG_SIGNATURE)
    assert path.read_text() == before


def test_what_ran_out_of_memory_is_left_out_of_table_and_picture(tmp_path, capsys):
    for module in (memory, training_step):
        _, path, _ = quick(module, tmp_path, "--precision", "fp32", "--checkpointing", "off", *FEW)
        content = json.loads(path.read_text())
        content["cases"][0]["values"]["spp"] = {"out_of_memory": 1.0}
        content["cases"][0]["samples"].pop("spp", None)
        path.write_text(json.dumps(content))
        result = module.BenchmarkResult.load(path, module.NAME)
        module.report(result)
        assert "out of memory" in capsys.readouterr().out
        module.draw(result, path.with_suffix(".png"))


@pytest.mark.parametrize("name", MODULES)
def test_wrong_choices_end_before_anything_is_measured(name, tmp_path):
    module = MODULES[name]
    wrong = [("--competitor", "dora"), ("--competitor", "spp"), ("--precision", "int8"), ("--machine", "a/b")]
    for option, value in wrong:
        outcome = run(module, "--quick", "--output-dir", str(tmp_path / "out"), option, value)
        assert outcome.exit_code == 2, (option, value)
        assert option in outcome.output
    assert not (tmp_path / "out").exists()


def test_the_result_of_another_benchmark_cannot_be_drawn(tmp_path):
    _, path, _ = quick(layer, tmp_path, "--precision", "fp32", *FEW)
    outcome = run(decode, "--plot-only", str(path))
    assert outcome.exit_code == 2
    assert "layer" in outcome.output


@pytest.mark.skipif(bitmask.tier() in (None, "portable"), reason="it measures compiled kernels next to their like")
def test_compressed_layers(tmp_path):
    outcome = run(
        compressed_layers, "--quick", "--machine", "box", "--output-dir", str(tmp_path), "--precision", "bf16"
    )
    assert outcome.exit_code == 0, outcome.output
    (path,) = (tmp_path / "box").glob("compressed_layers*-quick.json")
    cases = json.loads(path.read_text())["cases"]
    tasks = ["1", "2", "w", "w in chunks", "training"]
    assert [case["parameters"]["task"] for case in cases[::2]] == tasks * len(compressed_layers.SPARSITIES)
    for computing, passed in zip(cases[::2], cases[1::2], strict=True):
        assert (computing["parameters"]["clock"], passed["parameters"]["clock"]) == ("computing", "passed")
        assert {"dense", "compressed"} <= set(computing["samples"]) == set(passed["samples"])
        assert all(len(samples) == 2 for samples in (*computing["samples"].values(), *passed["samples"].values()))
        assert 0 < computing["values"]["compressed"]["bytes"] < computing["values"]["dense"]["bytes"]
    path.with_suffix(".png").unlink()
    assert run(compressed_layers, "--plot-only", str(path)).exit_code == 0
    assert path.with_suffix(".png").read_bytes().startswith(PNG_SIGNATURE)


def test_compressed_models(tmp_path, monkeypatch):
    monkeypatch.setattr(compressed_models, "NEW_TOKENS", 3)
    content, path, output = quick(compressed_models, tmp_path)
    tasks = {case["parameters"]["task"]: set(case["samples"]) for case in content["cases"]}
    assert tasks["generate"] == {"dense", "own", "50%", "75%"} and tasks["training step"] == {"dense", "2:4"}
    assert "compressed, 50 %" in output and path.with_suffix(".png").read_bytes().startswith(PNG_SIGNATURE)
    path.with_suffix(".png").unlink()
    assert run(compressed_models, "--plot-only", str(path)).exit_code == 0
    assert path.with_suffix(".png").is_file()


@pytest.mark.parametrize("tokens", [1, 3])
def test_layers_of_other_libraries_compute_the_same_up_to_their_rounding(tokens):
    weights, x = [torch.randn(64, 128).bfloat16() for _ in range(2)], torch.randn(tokens, 128).bfloat16()
    for name, layers in other_layers.other_layers(weights, x).items():
        for weight, compute in zip(weights, layers, strict=True):
            expected = x.double() @ weight.double().t()
            error = (compute().double() - expected).norm() / expected.norm()
            assert error < (0.15 if "4 bit" in name else 0.02), name


@pytest.mark.skipif(bitmask.tier() in (None, "portable"), reason="it has no kernel of the same make")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", dense_tokens.TOKENS)
def test_the_kernel_for_dense_weights_multiplies(tokens, dtype):
    weight, x = torch.randn(64, 192).to(dtype), torch.randn(tokens, 192).to(dtype)
    y = dense_tokens.dense_tokens(x, weight, bitmask.tier())
    torch.testing.assert_close(y, (x.double() @ weight.double().t()).to(dtype))


def test_weights_are_pruned_as_asked_for():
    weight = torch.randn(8, 64)
    for pattern, share in (("0.5", 0.5), ("0.75", 0.25), ("2:4", 0.5), ("2:8", 0.25)):
        pruned = compressed_layers.prune(weight, pattern)
        assert (pruned != 0).float().mean() == share
        assert torch.equal(pruned[pruned != 0], weight[pruned != 0])
        largest = pruned.abs().sum(1)
        assert (largest >= share * weight.abs().sum(1)).all()
    assert ((compressed_layers.prune(weight, "2:4").view(-1, 4) != 0).sum(1) == 2).all()
