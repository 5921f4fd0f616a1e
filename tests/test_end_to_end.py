# SPDX-License-Identifier: Apache-2.0
"""From a dense checkpoint to a sparse, fine-tuned, merged and verified one that generates text, by commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from peft_spp.cli import app
from peft_spp.demo.data import train_tokenizer

from tiny import tiny_llama


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


def command(*arguments: object) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def fine_tune(model: Path, data: Path, out: Path) -> None:
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
    command("sft", *(part for name, value in flags.items() for part in (f"--{name}", value)), "--use_cpu")


@pytest.mark.slow
def test_dense_to_deployed_by_commands(tmp_path: Path) -> None:
    dense, pruned, adapter, merged = (tmp_path / name for name in ("dense", "pruned", "adapter", "merged"))
    data = tmp_path / "texts.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    tokenizer = train_tokenizer(TEXTS, vocab_size=320)
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    tiny_llama(vocab_size=len(tokenizer), **special).save_pretrained(dense)
    tokenizer.save_pretrained(dense)

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

    done = subprocess.run(
        [sys.executable, "-c", GENERATE, merged],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(tokenizer("Line 7 is")["input_ids"]) + 5
