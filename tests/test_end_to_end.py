# SPDX-License-Identifier: Apache-2.0
"""From a dense checkpoint to a sparse, fine-tuned, merged and verified one that generates text, by commands."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from peft_spp.cli import app
from peft_spp.demo.data import train_tokenizer

from helpers.tiny import tiny_llama
from helpers.tiny_moe import PARAMETERS, tiny_moe


TEXTS = [f"Line {number} is about the number {number * number % 17}." for number in range(200)]

GENERATE = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer("Line 7 is", return_tensors="pt")
print(model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False).shape[1])
assert "peft_spp" not in sys.modules
"""

GENERATE_COMPRESSED = GENERATE.replace("import torch", "import torch, peft_spp").partition("assert")[0]


def command(*arguments: object) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def fine_tune(model: Path, data: Path, out: Path, *more: str) -> None:
    flags = {
        "model_name_or_path": model,
        "dataset_name": data,
        "output_dir": out,
        "spp_r": 4,
        "max_steps": 3,
        "learning_rate": 0.1,
        "max_length": 32,
        "bf16": "false",
        "gradient_checkpointing": "false",
        "save_strategy": "no",
        "report_to": "none",
    }
    command("sft", *(part for name, value in flags.items() for part in (f"--{name}", value)), "--use_cpu", *more)


def write_data_and_model(folder: Path, dense: Path, make: Callable[..., nn.Module] = tiny_llama) -> tuple[Path, Any]:
    data = folder / "texts.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    tokenizer = train_tokenizer(TEXTS, vocab_size=320)
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    make(vocab_size=len(tokenizer), **special).save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    return data, tokenizer


def generate(code: str, model: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, model],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_dense_to_deployed_by_commands(tmp_path: Path) -> None:
    dense, pruned, adapter, merged = (tmp_path / name for name in ("dense", "pruned", "adapter", "merged"))
    data, tokenizer = write_data_and_model(tmp_path, dense)
    command("prune", dense, pruned, "--pattern", "2:4", "--calibration", data, "--samples", 8)
    fine_tune(pruned, data, adapter)
    report = json.loads(command("merge", adapter, merged, "--json"))
    assert report["lost"] == 0 and len(report["modules"]) == 21

    trained = json.loads(command("inspect", adapter, "--json"))
    assert trained["change"] > 0 and all(module["mask"]["pattern"] == "2:4" for module in trained["modules"])
    inspected = json.loads(command("inspect", merged, "--json"))
    assert inspected["total_sparsity"] == 0.5 and {one["pattern"] for one in inspected["modules"]} == {"2:4"}
    compared = json.loads(command("compare", pruned, merged, "--json"))
    assert compared["kept"] and compared["lost"] == 0 and compared["negative_zeros"] == 0
    assert CliRunner().invoke(app, ["compare", str(pruned), str(dense)]).exit_code == 1

    assert int(generate(GENERATE, merged)) == len(tokenizer("Line 7 is")["input_ids"]) + 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_compressed_from_pruning_to_generation_equals_the_way_without(kind: str, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    make = tiny_llama if kind == "llama" else partial(tiny_moe, kind)
    targets = () if kind == "llama" else ("--spp_target_parameters", *PARAMETERS)
    data, tokenizer = write_data_and_model(tmp_path, dense, make)
    arguments = ("--pattern", "2:4", "--calibration", data, "--samples", 8)
    command("prune", dense, tmp_path / "pruned", *arguments)
    command("prune", dense, tmp_path / "small", *arguments, "--compress")
    sizes = [
        sum(one.stat().st_size for one in (tmp_path / name).glob("*.safetensors")) for name in ("pruned", "small")
    ]
    assert sizes[1] < sizes[0]

    # trained on the compressed model, and merged into both
    fine_tune(tmp_path / "small", data, tmp_path / "adapter", *targets)
    if not targets:  # adapters of parameters are not inspected
        trained = json.loads(command("inspect", tmp_path / "adapter", "--json"))
        assert trained["change"] > 0 and all(module["mask"]["pattern"] == "2:4" for module in trained["modules"])
    command("merge", tmp_path / "adapter", tmp_path / "merged small")
    command("merge", tmp_path / "adapter", tmp_path / "merged", "--base", tmp_path / "pruned", "--check-base", "error")
    command("decompress", tmp_path / "merged small", tmp_path / "back")
    expected, actual = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "back"))
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor.view(torch.int32), actual[name].view(torch.int32)), name
    compared = json.loads(command("compare", tmp_path / "small", tmp_path / "merged small", "--json"))
    assert compared["kept"] and compared["lost"] == 0

    # training itself differs from training on the dense model by rounding at most
    fine_tune(tmp_path / "pruned", data, tmp_path / "adapter of dense", *targets)
    first, second = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "adapter of dense")
    )
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-3, atol=1e-4)

    tokens = len(tokenizer("Line 7 is")["input_ids"]) + 5
    assert int(generate(GENERATE_COMPRESSED, tmp_path / "merged small")) == tokens
    assert int(generate(GENERATE, tmp_path / "back")) == tokens
