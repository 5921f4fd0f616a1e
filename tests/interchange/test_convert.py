# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the SPP authors' code, against their formula written out in float64."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from peft_spp.cli import app
from peft_spp.interchange import convert_adapter

from helpers.tiny import block_linears, prune_, tiny_llama


# what their scripts write besides the factors
SETTINGS = {
    "base_model_name_or_path": "",
    "bias": "none",
    "enable_lora": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "merge_weights": False,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 8,
    "target_modules": ["q_proj", "v_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "score"],
    "task_type": "CAUSAL_LM",
}
ROWS = 16
IDS = torch.arange(12).view(2, 6)


def save_base(folder: Path) -> None:
    model = tiny_llama()
    for layer in block_linears(model).values():
        prune_(layer.weight, "2:4")
    model.save_pretrained(folder)


def authors_tensors(base: nn.Module, layout: str, dtype=torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    tensors = {}
    for name, layer in block_linears(base).items():
        m, n = layer.weight.shape
        shape = (m, 1) if layout == "column" else (1, m)
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(ROWS, n).to(dtype)
        tensors[f"base_model.model.{name}.lora_A.weight_col"] = (torch.randn(shape) * 0.3).to(dtype)
    return tensors


def save_authors(folder: Path, tensors: dict[str, torch.Tensor], **settings) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS | settings))
    torch.save(tensors, folder / "adapter_model.bin")
    return folder


@torch.no_grad()
def authors_logits(base: nn.Module, tensors: dict[str, torch.Tensor], scaling: float) -> torch.Tensor:
    """The logits with W + repeat(A) ⊙ column ⊙ W · lora_alpha / r, row by row as their merge repeats A."""
    base = base.double()
    for name, layer in block_linears(base).items():
        A = tensors[f"base_model.model.{name}.lora_A.weight"].double()
        column = tensors[f"base_model.model.{name}.lora_A.weight_col"].double().reshape(-1)
        W = layer.weight
        repeats = W.shape[0] // ROWS
        for row in range(W.shape[0]):
            W[row] += A[row // repeats] * column[row] * W[row] * scaling
    return base(input_ids=IDS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", ["column", "row"])
@pytest.mark.parametrize(("alpha", "r"), [(16, 8), (7, 3)])
def test_the_logits_are_those_of_their_formula(tmp_path, layout, dtype, alpha, r):
    save_base(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    tensors = authors_tensors(base, layout, dtype)
    save_authors(tmp_path / "authors", tensors, lora_alpha=alpha, r=r)
    report = convert_adapter(tmp_path / "authors", tmp_path / "spp", base=str(tmp_path / "base"))
    assert {module.r for module in report} == {ROWS} and len(report) == 21
    assert {module.scaling for module in report} == {alpha / r}

    stored = load_file(tmp_path / "spp" / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        ours = name.replace("lora_A.weight_col", "spp_B.weight").replace("lora_A.weight", "spp_A.weight")
        assert torch.equal(stored[ours].flatten(), tensor.flatten()) and stored[ours].dtype == dtype
    assert len(stored) == len(tensors)

    expected = authors_logits(base, tensors, alpha / r)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    model = PeftModel.from_pretrained(model, tmp_path / "spp", autocast_adapter_dtype=False).double().eval()
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, atol=1e-12, rtol=1e-12)
    in_float32 = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "spp").eval()
    torch.testing.assert_close(in_float32(input_ids=IDS).logits.double(), expected, atol=1e-4, rtol=1e-4)


def test_the_settings_say_what_ours_mean(tmp_path):
    save_base(tmp_path / "base")
    tensors = authors_tensors(tiny_llama(), "column")
    save_authors(tmp_path / "authors", tensors, base_model_name_or_path="someone/a-pruned-llama")
    convert_adapter(tmp_path / "authors", tmp_path / "spp")
    config = json.loads((tmp_path / "spp" / "adapter_config.json").read_text())
    assert config["peft_type"] == "SPP" and config["r"] == ROWS and config["spp_alpha"] == 32
    assert config["spp_dropout"] == 0.05 and config["task_type"] == "CAUSAL_LM" and config["bias"] == "none"
    # there is no `score` in this model
    assert set(config["target_modules"]) == set(SETTINGS["target_modules"]) - {"score"}
    assert config["base_model_name_or_path"] == "someone/a-pruned-llama"
    card = ModelCard.load(tmp_path / "spp" / "README.md")
    assert card.data.base_model == "someone/a-pruned-llama" and card.data.library_name == "peft"
    assert "spp" in card.data.tags and "import peft_spp" in card.text


def test_targets_that_mean_something_else_in_peft_are_spelled_out(tmp_path):
    # their code matches the end of a name anywhere, PEFT only at a dot
    tensors = {k: v for k, v in authors_tensors(tiny_llama(), "column").items() if "self_attn" in k}
    save_authors(tmp_path / "authors", tensors, target_modules=["_proj"])
    report = convert_adapter(tmp_path / "authors", tmp_path / "spp")
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "spp")
    adapted = {name.split(".spp_A")[0] for name, _ in model.base_model.model.named_parameters() if ".spp_A." in name}
    assert adapted == set(report.modules) and len(adapted) == 12


def edit(tensors, name, value):
    """One factor replaced, or removed by `None`."""
    changed = {**tensors, name: value}
    return {key: tensor for key, tensor in changed.items() if tensor is not None}


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A."


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({f"{Q}weight_col": None}, {}, "q_proj.*weight_col is missing"),
        ({f"{Q}weight": torch.zeros(0, 32)}, {}, r"q_proj.*shapes \(0, 32\)"),
        ({5: torch.zeros(1, 4)}, {}, "names and tensors"),
        ({f"{Q}weight": torch.zeros(5, 32)}, {}, "q_proj.*32 output rows.*5"),
        ({f"{Q}weight": torch.zeros(8, 32)}, {}, "same number of rows"),
        ({f"{Q}weight_col": torch.zeros(4, 8)}, {}, "shapes"),
        ({f"{Q}weight": torch.full((ROWS, 32), float("nan"))}, {}, "q_proj.*finite"),
        ({Q.replace("lora_A", "lora_B") + "weight": torch.zeros(32, 8)}, {}, "lora_B.*LoRA"),
        ({}, {"bias": "lora_only"}, "bias"),
        ({}, {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({}, {"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({}, {"r": 0}, "r=0"),
        ({}, {"peft_type": "IA3"}, "IA3"),
    ],
)
def test_what_cannot_be_converted_is_named(tmp_path, changes, settings, message):
    tensors = authors_tensors(tiny_llama(), "column")
    for name, value in changes.items():
        tensors = edit(tensors, name, value)
    save_authors(tmp_path / "authors", tensors, **settings)
    with pytest.raises(ValueError, match=message):
        convert_adapter(tmp_path / "authors", tmp_path / "spp")
    assert not (tmp_path / "spp").exists()


class Opens:
    """Unpickling this would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_file_that_runs_code_or_is_cut_short_is_refused(tmp_path):
    folder = save_authors(tmp_path / "authors", {"x": Opens(str(tmp_path / "written"))})
    with pytest.raises(ValueError, match=r"adapter_model\.bin"):
        convert_adapter(folder, tmp_path / "spp")
    assert not (tmp_path / "written").exists()
    save_authors(folder, authors_tensors(tiny_llama(), "column"))
    whole = (folder / "adapter_model.bin").read_bytes()
    for length in (0, 100, len(whole) // 2):
        (folder / "adapter_model.bin").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"adapter_model\.bin"):
            convert_adapter(folder, tmp_path / "spp")
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.bin"):
        convert_adapter(folder, tmp_path / "spp")


def test_a_lora_adapter_of_peft_is_refused(tmp_path):
    get_peft_model(tiny_llama(), LoraConfig()).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="lora_B"):
        convert_adapter(tmp_path / "lora", tmp_path / "spp")


def run(*arguments):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def test_the_command_has_a_dry_run_json_and_exit_codes(tmp_path):
    tensors = authors_tensors(tiny_llama(), "row")
    authors, out = save_authors(tmp_path / "authors", tensors), tmp_path / "out"
    dry = run(authors, out, "--dry-run", "--json")
    report = json.loads(dry.stdout)
    assert dry.exit_code == 0 and report["dry_run"] and len(report["modules"]) == 21 and not out.exists()
    assert run(authors, out, "--base", "someone/llama").exit_code == 0
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/llama"
    again = run(authors, out)
    assert again.exit_code == 2 and again.stdout == "" and again.stderr.count("\n") == 1
    assert run(authors, out, "--overwrite").exit_code == 0
    assert run(authors).exit_code == 2
    # saved as safetensors it is the same
    (authors / "adapter_model.bin").unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, authors / "adapter_model.safetensors")
    before = load_file(out / "adapter_model.safetensors")
    shutil.rmtree(out)
    assert run(authors, out).exit_code == 0
    after = load_file(out / "adapter_model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in after)
