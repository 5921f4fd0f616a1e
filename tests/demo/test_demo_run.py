# SPDX-License-Identifier: Apache-2.0
import io
import json
import math
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from demo_smoke import SmokeRun
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_spp.demo.checks import CHECK_SCRIPT, SavedModelCheck, check_saved_models, recovered_share
from peft_spp.demo.display import make_progress, show_step
from peft_spp.demo.output import OutputFolder
from peft_spp.sparsity import compare_sparsity, sparsity_report


def test_all_that_a_demo_writes_is_known_to_be_its_own(smoke_run: SmokeRun) -> None:
    smoke_run.output.check()


def test_checks_agree_with_the_files(smoke_run: SmokeRun) -> None:
    """The same numbers from the files, computed in another way."""
    text = smoke_run.output.held_out_text.read_text(encoding="utf-8")
    for name, check in smoke_run.checks.items():
        folder = getattr(smoke_run.output, name)
        tokens = torch.tensor(AutoTokenizer.from_pretrained(folder)(text)["input_ids"])
        blocks = tokens[: len(tokens) // 32 * 32].reshape(-1, 32)
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(folder)(blocks).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), blocks[:, 1:].flatten())
        assert check.perplexity == pytest.approx(math.exp(loss), rel=1e-4)

        report = sparsity_report(folder)
        sparse = name in ("pruned", "lora_masked", "spp_merged")
        assert check.sparsity == (0.5 if sparse else pytest.approx(0.0, abs=1e-3))
        assert check.is_2_4 is sparse
        assert report.all_satisfy("2:4") is sparse


def test_models_differ_and_spp_keeps_each_zero(smoke_run: SmokeRun) -> None:
    weights = {name: load_file(getattr(smoke_run.output, name) / "model.safetensors") for name in smoke_run.checks}
    name = "model.layers.0.mlp.down_proj.weight"
    for first, second in (("dense", "pruned"), ("pruned", "spp_merged"), ("pruned", "lora_merged")):
        assert not torch.equal(weights[first][name], weights[second][name])
    assert not compare_sparsity(smoke_run.output.pruned, smoke_run.output.spp_merged).lost
    assert compare_sparsity(smoke_run.output.pruned, smoke_run.output.lora_merged).lost
    # masked again, the merged LoRA differs from what was merged at the zeros of the pruned model alone
    zeros = weights["pruned"][name] == 0
    assert torch.equal(weights["lora_masked"][name], weights["lora_merged"][name].masked_fill(zeros, 0))


def test_adapters_load_on_the_pruned_model(smoke_run: SmokeRun) -> None:
    for adapter, merged in (("spp_adapter", "spp_merged"), ("lora_adapter", "lora_merged")):
        pruned = AutoModelForCausalLM.from_pretrained(smoke_run.output.pruned)
        model = PeftModel.from_pretrained(pruned, getattr(smoke_run.output, adapter)).merge_and_unload()
        saved = AutoModelForCausalLM.from_pretrained(getattr(smoke_run.output, merged))
        for name, value in saved.state_dict().items():
            assert torch.equal(value, model.state_dict()[name])


def test_progress_table_and_folders_are_shown(smoke_run: SmokeRun) -> None:
    for text in (
        "Fine-tune it with SPP",
        "Fine-tune it with LoRA",
        "20/20",
        "10/10",
        f"{smoke_run.checks['spp_merged'].perplexity:.2f}",
        str(smoke_run.output.spp_adapter),
        str(smoke_run.output.spp_merged),
    ):
        assert text in smoke_run.shown


def test_results_are_saved(smoke_run: SmokeRun) -> None:
    results = json.loads(smoke_run.output.results.read_text(encoding="utf-8"))
    assert {name: SavedModelCheck(**check) for name, check in results["models"].items()} == smoke_run.checks


def copy_output(smoke_run: SmokeRun, tmp_path: Path) -> OutputFolder:
    shutil.copytree(smoke_run.output.root, tmp_path / "copy")
    return OutputFolder(tmp_path / "copy")


def test_one_lost_zero_on_disk_is_noticed(smoke_run: SmokeRun, tmp_path: Path) -> None:
    output = copy_output(smoke_run, tmp_path)
    file = output.spp_merged / "model.safetensors"
    weights = load_file(file)
    weight = weights["model.layers.0.mlp.down_proj.weight"]
    weight.view(-1)[(weight.view(-1) == 0).nonzero()[0]] = 1e-6
    save_file(weights, file, metadata={"format": "pt"})
    checks = check_saved_models(output, smoke_run.config)
    assert not checks["spp_merged"].is_2_4
    assert checks["pruned"] == smoke_run.checks["pruned"]


def test_a_missing_weight_on_disk_is_an_error(smoke_run: SmokeRun, tmp_path: Path) -> None:
    output = copy_output(smoke_run, tmp_path)
    file = output.spp_merged / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.0.mlp.down_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=r"spp-merged do not match the model.*down_proj"):
        check_saved_models(output, smoke_run.config)


def test_check_script_refuses_to_run_with_peft_spp(smoke_run: SmokeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "peft_spp" in sys.modules
    arguments = [CHECK_SCRIPT, smoke_run.output.held_out_text, "32", smoke_run.output.spp_merged]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    with pytest.raises(RuntimeError, match="peft_spp has been imported"):
        runpy.run_path(str(CHECK_SCRIPT), run_name="__main__")


def test_recovered_share() -> None:
    checks = {
        name: SavedModelCheck(perplexity, 0.5, 1.0)
        for name, perplexity in (("dense", 10.0), ("pruned", 40.0), ("spp_merged", 20.0))
    }
    assert recovered_share(checks, "spp_merged") == pytest.approx(0.5)


@pytest.mark.slow
def test_full_demo_meets_the_expectation(tmp_path: Path) -> None:
    """Pruned is worse than dense, SPP recovers most of that and stays 2:4, LoRA does not, or loses more."""
    command = "from peft_spp.cli import app; app()"
    subprocess.run([sys.executable, "-c", command, "demo", "--output", tmp_path / "out"], check=True)
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    checks = {name: SavedModelCheck(**check) for name, check in results["models"].items()}
    assert checks["pruned"].perplexity > 1.1 * checks["dense"].perplexity
    assert recovered_share(checks, "spp_merged") > 0.5
    assert checks["pruned"].is_2_4 and checks["spp_merged"].is_2_4
    assert checks["spp_merged"].sparsity == 0.5
    assert not checks["lora_merged"].is_2_4
    assert checks["lora_masked"].is_2_4
    assert checks["lora_masked"].perplexity > checks["spp_merged"].perplexity


@pytest.mark.parametrize("is_terminal", [True, False])
def test_each_step_is_named_when_it_starts(is_terminal: bool) -> None:
    shown = io.StringIO()
    with make_progress(Console(file=shown, force_terminal=is_terminal)) as progress:
        with show_step(progress, "Some step"):
            progress.refresh()
            assert "Some step" in shown.getvalue()
