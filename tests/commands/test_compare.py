# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner

from peft_spp import SPPConfig
from peft_spp.cli import app

from helpers.tiny import block_linears, prune_, tiny_llama


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = tiny_llama()
    for layer in block_linears(model).values():
        prune_(layer.weight, "2:4")
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def changed(base: Path, folder: Path, change) -> Path:
    model = type(tiny_llama()).from_pretrained(base)
    with torch.no_grad():
        change(model.model.layers[1].mlp.up_proj.weight)
    model.save_pretrained(folder)
    return folder


def run(*arguments: object):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def test_kept_zeros_end_with_0(tmp_path: Path, base: Path) -> None:
    more = changed(base, tmp_path / "more", lambda weight: weight[0].zero_())
    result = run(base, more)
    assert result.exit_code == 0 and "all zeros kept" in result.stdout
    found = json.loads(run(base, more, "--json").stdout)
    assert found["kept"] and found["lost"] == 0 and found["gained"] == 16
    row = next(line for line in result.stdout.splitlines() if line.startswith("model.layers.1.mlp.up_proj"))
    assert row.split()[1:] == ["1,536", "768", "784", "0", "16"]


def test_a_lost_zero_ends_with_1(tmp_path: Path, base: Path) -> None:
    def fill_one(weight: torch.Tensor) -> None:
        weight.view(-1)[(weight == 0).view(-1).nonzero()[0]] = 1.0

    dense = changed(base, tmp_path / "dense", fill_one)
    result = run(base, dense)
    assert result.exit_code == 1 and "zeros not kept" in result.stdout
    found = json.loads(run(base, dense, "--json").stdout)
    lost = {module["name"]: module["lost"] for module in found["modules"] if module["lost"]}
    assert lost == {"model.layers.1.mlp.up_proj": 1}
    assert run(base, dense, "--modules", "q_proj").exit_code == 0
    assert run(base, dense, "--modules", r".*\.layers\.1\..*").exit_code == 1


def test_what_cannot_be_compared_is_not_kept(tmp_path: Path, base: Path) -> None:
    tiny_llama(num_hidden_layers=2).save_pretrained(tmp_path / "short")
    assert run(base, tmp_path / "short", "--json").exit_code == 1


def test_an_adapter_is_trouble_and_no_lost_zero(tmp_path: Path, base: Path) -> None:
    for config in (SPPConfig(r=4), LoraConfig(target_modules=["q_proj"])):
        adapter = tmp_path / type(config).__name__
        get_peft_model(tiny_llama(), config).save_pretrained(adapter)
        for arguments in ([base, adapter], [adapter, base], [base, adapter / "adapter_model.safetensors"]):
            result = run(*arguments)
            assert result.exit_code == 2 and result.stdout == ""
            assert "but an adapter: pass the model that it is for, or merge it first" in result.stderr


def test_trouble_ends_with_2(tmp_path: Path, base: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "model.safetensors").write_bytes(b"not safetensors")
    for arguments in ([base, tmp_path / "nowhere"], [base, tmp_path / "bad"], [base]):
        assert run(*arguments).exit_code == 2
