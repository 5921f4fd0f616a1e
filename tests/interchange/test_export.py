# SPDX-License-Identifier: Apache-2.0
"""SPP adapters as HiRA adapters, which plain PEFT loads in a process that does not know peft_spp."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from peft_spp import SPPConfig
from peft_spp.cli import app
from peft_spp.functional import expand_row_blocks
from peft_spp.interchange import export_adapter
from peft_spp.merge import merge_checkpoint

from helpers.tiny import LLAMA, block_linears, prune_, randomize, tiny, tiny_llama
from helpers.tiny_moe import PARAMETERS, tiny_moe


IDS = torch.arange(12).view(2, 6)
GPT2 = {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
# name: class, settings of the model, adapter
CASES = {
    # rows that r does not divide, other ranks and scalings (of which none is a power of two) in some layers
    "patterns": (
        "LlamaForCausalLM",
        LLAMA,
        SPPConfig(
            r=5,
            spp_alpha=7,
            rank_pattern={"k_proj": 3, "layers.1.mlp.up_proj": 40},
            alpha_pattern={"q_proj": 11.5},
            layers_to_transform=[0, 1],
            task_type="CAUSAL_LM",
        ),
    ),
    "conv1d": ("GPT2LMHeadModel", GPT2, SPPConfig(r=4, fan_in_fan_out=True, task_type="CAUSAL_LM")),
    "head": (
        "LlamaForSequenceClassification",
        {**LLAMA, "num_labels": 3, "pad_token_id": 0},
        SPPConfig(r=4, task_type="SEQ_CLS"),
    ),
}


def save_adapter(folder: Path, class_name="LlamaForCausalLM", settings=LLAMA, config=None) -> PeftModel:
    """A pruned base and an adapter with random factors in a folder; the model comes from the folder."""
    model = tiny(class_name, **settings)
    for layer in block_linears(model).values():
        prune_(layer.weight, "2:4")
    model.save_pretrained(folder / "base")
    model = getattr(transformers, class_name).from_pretrained(folder / "base")
    adapted = get_peft_model(model, config or SPPConfig(r=4, task_type="CAUSAL_LM")).eval()
    randomize(adapted)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and ".spp_" not in name:
                parameter.normal_()
    adapted.save_pretrained(folder / "adapter")
    return adapted


def load(folder: Path, class_name="LlamaForCausalLM", dtype=torch.float32, adapter="adapter") -> PeftModel:
    base = getattr(transformers, class_name).from_pretrained(folder / "base", dtype=dtype)
    in_float64 = dtype == torch.float64
    return PeftModel.from_pretrained(base, folder / adapter, autocast_adapter_dtype=not in_float64).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


def logits_of_plain_peft(wanted: list, tmp_path: Path) -> list:
    script = Path(__file__).with_name("plain_peft.py")
    out = tmp_path / "logits.pt"
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-I", script, json.dumps(wanted), out],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return torch.load(out)


def test_plain_peft_gives_the_logits_of_the_spp_adapter(tmp_path):
    expected, wanted = [], []
    for name, (class_name, settings, config) in CASES.items():
        folder = tmp_path / name
        save_adapter(folder, class_name, settings, config)
        report = export_adapter(folder / "adapter", folder / "hira")
        assert report.method == "HIRA" and len(report) > 0
        assert bool(report.others) == (name == "head")
        for dtype in ("float32", "float64", "bfloat16"):
            model = load(folder, class_name, getattr(torch, dtype))
            wanted.append([class_name, str(folder / "base"), str(folder / "hira"), dtype])
            expected.append((dtype, logits(model)))
            with model.disable_adapter():
                # without the adapter the logits are others, so equal ones say something
                assert not torch.allclose(logits(model).float(), expected[-1][1].float(), atol=0.05)
    # s · B is rounded to float32 in the file, so float64 agrees to that
    tolerance = {"float32": 2e-5, "float64": 2e-6, "bfloat16": 0.1}
    for (dtype, ours), (unmerged, merged) in zip(expected, logits_of_plain_peft(wanted, tmp_path), strict=True):
        torch.testing.assert_close(unmerged, ours, atol=tolerance[dtype], rtol=tolerance[dtype])
        torch.testing.assert_close(merged, ours, atol=tolerance[dtype], rtol=tolerance[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("alpha", [8, 7])
def test_the_factor_of_the_weight_is_the_same_bit_for_bit(tmp_path, dtype, alpha):
    model = save_adapter(tmp_path, config=SPPConfig(r=5, spp_alpha=alpha, rank_pattern={"up_proj": 48}))
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    spp = load_file(path)
    export_adapter(tmp_path / "adapter", tmp_path / "hira")
    hira = load_file(tmp_path / "hira" / "adapter_model.safetensors")
    assert len(hira) == len(spp) and len(hira) > 0
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for name in (name.removesuffix(".spp_A.weight") for name in spp if "spp_A" in name):
        A, B = spp[f"{name}.spp_A.weight"].to(compute), spp[f"{name}.spp_B.weight"].to(compute)
        expected = expand_row_blocks(A, B.shape[0]) * (B * (alpha / A.shape[0]))
        product = hira[f"{name}.hira_B"] @ hira[f"{name}.hira_A"]
        assert product.dtype == compute and torch.equal(product, expected)
        assert ((hira[f"{name}.hira_B"] != 0).sum(1) == 1).all()
    assert {shape.shape[0] for name, shape in hira.items() if "hira_A" in name} == {48}
    assert model.peft_config["default"].rank_pattern  # which PEFT 0.21 does not read of a HiRA configuration


def test_the_settings_and_the_card_are_those_of_the_adapter(tmp_path):
    save_adapter(
        tmp_path,
        config=SPPConfig(r=4, spp_dropout=0.25, layers_to_transform=[0], task_type="CAUSAL_LM", revision="v2"),
    )
    export_adapter(tmp_path / "adapter", tmp_path / "hira")
    ours = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    theirs = json.loads((tmp_path / "hira" / "adapter_config.json").read_text())
    assert theirs["peft_type"] == "HIRA" and theirs["r"] == 4 and theirs["hira_dropout"] == 0.25
    same = ("base_model_name_or_path", "revision", "task_type", "layers_to_transform", "inference_mode")
    assert {name: theirs[name] for name in same} == {name: ours[name] for name in same}
    assert set(theirs["target_modules"]) == set(ours["target_modules"])
    card = ModelCard.load(tmp_path / "hira" / "README.md")
    assert card.data.library_name == "peft" and "hira" in card.data.tags and "spp" not in card.data.tags
    assert card.data.pipeline_tag == "text-generation"


def test_what_hira_has_not_is_refused(tmp_path):
    save_adapter(tmp_path, "GPT2LMHeadModel", GPT2, SPPConfig(r=4, bias="spp_only", fan_in_fan_out=True))
    with pytest.raises(ValueError, match="bias"):
        export_adapter(tmp_path / "adapter", tmp_path / "hira")
    assert not (tmp_path / "hira").exists()


def test_experts_are_refused_by_name_with_the_way_round(tmp_path):
    model = tiny_moe("mixtral", pattern="2:4")
    model.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(model, SPPConfig(r=4, target_parameters=PARAMETERS, target_modules=[]))
    adapted.save_pretrained(tmp_path / "adapter")
    result = run(tmp_path / "adapter", tmp_path / "hira")
    assert result.exit_code == 2 and "experts.down_proj" in result.stderr and not (tmp_path / "hira").exists()
    assert "target_parameters" in result.stderr and "instead: peft-spp merge" in result.stderr
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", check_base="error")


def test_a_list_of_no_experts_is_not_in_the_way(tmp_path):
    save_adapter(tmp_path, config=SPPConfig(r=4, target_parameters=[]))
    assert len(export_adapter(tmp_path / "adapter", tmp_path / "hira")) > 0


def test_another_target_or_adapter_is_refused(tmp_path):
    save_adapter(tmp_path)
    with pytest.raises(ValueError, match="hira"):
        export_adapter(tmp_path / "adapter", tmp_path / "out", to="lora")
    with pytest.raises(ValueError, match="contain"):
        export_adapter(tmp_path / "adapter", tmp_path / "adapter" / "out")
    get_peft_model(tiny_llama(), peft.LoraConfig()).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="LORA"):
        export_adapter(tmp_path / "lora", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "lora"]


def test_a_failing_write_leaves_the_old_adapter_and_nothing_else(tmp_path, monkeypatch):
    save_adapter(tmp_path)
    export_adapter(tmp_path / "adapter", tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("old")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(peft.HiraConfig, "save_pretrained", full)
    with pytest.raises(OSError, match="space"):
        export_adapter(tmp_path / "adapter", tmp_path / "out", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]
    monkeypatch.undo()
    export_adapter(tmp_path / "adapter", tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "README.md").read_text() != "old"


@pytest.mark.parametrize("dry_run", [True, False])
def test_the_checkpoints_of_a_run_are_not_overwritten(tmp_path, dry_run):
    save_adapter(tmp_path)
    shutil.copytree(tmp_path / "adapter", tmp_path / "out")
    (tmp_path / "out" / "checkpoint-5").mkdir()
    (tmp_path / "out" / "checkpoint-5" / "optimizer.pt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match=r"checkpoint-5/optimizer\.pt"):
        export_adapter(tmp_path / "adapter", tmp_path / "out", overwrite=True, dry_run=dry_run)
    assert sorted(tmp_path.rglob("*")) == before


def run(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def test_the_command_has_a_dry_run_json_and_exit_codes(tmp_path):
    save_adapter(tmp_path)
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    dry = run(adapter, out, "--to", "hira", "--dry-run", "--json")
    report = json.loads(dry.stdout)
    assert dry.exit_code == 0 and report["dry_run"] and not out.exists()
    assert run(adapter, out).exit_code == 0
    stored = load_file(out / "adapter_model.safetensors")
    assert report["size"] == sum(t.numel() * t.element_size() for t in stored.values())
    assert sum(module["parameters"] for module in report["modules"]) == sum(t.numel() for t in stored.values())
    again = run(adapter, out)
    assert again.exit_code == 2 and again.stdout == "" and again.stderr.count("\n") == 1
    assert run(adapter, out, "--overwrite").exit_code == 0
    assert run(tmp_path / "nowhere", tmp_path / "other").exit_code == 2
    assert run(adapter).exit_code == 2 and run(adapter, out, "--to", "lora").exit_code == 2
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert run(adapter, tmp_path / "model", "--overwrite").exit_code == 2
    assert (tmp_path / "model" / "config.json").read_text() == "{}"
