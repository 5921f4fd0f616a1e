# SPDX-License-Identifier: Apache-2.0
"""Programs that load adapters themselves and know nothing of peft_spp, run by `python -m peft_spp`."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import AutoModelForCausalLM

from helpers.tiny import randomize
from helpers.trl_cases import pruned_model, spp_config, tiny_tokenizer


ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
PROMPT = "a zero stays"
TASK = """task: colors
dataset_path: json
dataset_kwargs:
  data_files: {file}
output_type: multiple_choice
test_split: train
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned model in `base` and an adapter in `adapter` that changes it much, both with their tokenizer."""
    folder = tmp_path_factory.mktemp("programs")
    base = pruned_model()
    base.save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    adapted = get_peft_model(base, spp_config())
    randomize(adapted, scale=2.0)
    adapted.save_pretrained(folder / "adapter")
    for name in ("base", "adapter"):
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


def program(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "peft_spp", *map(str, arguments)]


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def generated(model: Any, count: int) -> str:
    """What a model adds to the prompt."""
    inputs = tiny_tokenizer()(PROMPT, return_tensors="pt")
    with torch.no_grad():
        tokens = model.eval().generate(**inputs, max_new_tokens=count, do_sample=False)
    return tiny_tokenizer().decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@contextmanager
def served(command: list[str], folder: Path, port: int) -> Iterator[None]:
    """While active, a server answers on a port."""
    with (folder / "log.txt").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 240
            while not answers(port):
                assert server.poll() is None and time.monotonic() < deadline, (folder / "log.txt").read_text()[-3000:]
                time.sleep(0.3)
            yield
        finally:
            server.terminate()
            server.wait(timeout=60)


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5):
            return True
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        port: int = one.getsockname()[1]
        return port


@pytest.mark.slow
def test_transformers_serve_answers_with_an_adapter(folder: Path) -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("openai")
    pytest.importorskip("uvicorn")
    # it wants a whole model in the folder, also for a LoRA adapter
    both = shutil.copytree(folder / "base", folder / "both")
    shutil.copytree(folder / "adapter", both, dirs_exist_ok=True)
    port = free_port()
    command = program("transformers", "serve", both, "--port", port, "--device", "cpu")
    with served(command, folder, port):
        body = {"model": str(both), "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
        request = urllib.request.Request(
            f"http://localhost:{port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            text = json.load(response)["choices"][0]["text"]
    adapted = generated(AutoPeftModelForCausalLM.from_pretrained(folder / "adapter"), 12)
    base = generated(AutoModelForCausalLM.from_pretrained(folder / "base"), 12)
    assert text == adapted != base


@pytest.mark.slow
def test_the_evaluation_harness_measures_an_adapter(folder: Path) -> None:
    pytest.importorskip("lm_eval")
    tasks = folder / "tasks"
    tasks.mkdir()
    rows = [{"question": f"Is thing {n} red?", "choices": ["red", "it is green"], "answer": n % 2} for n in range(6)]
    (tasks / "colors.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "colors.yaml").write_text(TASK.format(file=tasks / "colors.jsonl"))
    arguments = f"pretrained={folder / 'base'},peft={folder / 'adapter'}"
    options = ["--model", "hf", "--model_args", arguments, "--tasks", "colors", "--include_path", tasks]
    options += ["--device", "cpu", "--batch_size", 1, "--output_path", folder / "out", "--log_samples"]
    run(program("lm_eval", *options), folder)

    (samples,) = (folder / "out").rglob("samples_colors*.jsonl")
    found = {}
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        for choice, answer in zip(sample["doc"]["choices"], sample["resps"], strict=True):
            found[sample["doc"]["question"], choice] = float(answer[0][0])
    assert len(found) == 12
    adapted = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter").eval()
    base = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    assert found == pytest.approx({pair: log_likelihood(adapted, *pair) for pair in found}, rel=1e-3)
    assert found != pytest.approx({pair: log_likelihood(base, *pair) for pair in found}, rel=1e-2)


@torch.no_grad()
def log_likelihood(model: Any, question: str, answer: str) -> float:
    tokenizer = tiny_tokenizer()
    ids = torch.tensor([tokenizer.encode(f"{question} {answer}")])
    asked = len(tokenizer.encode(question))
    scores = model(input_ids=ids).logits[0, asked - 1 : -1].log_softmax(-1)
    return float(scores.gather(1, ids[0, asked:, None]).sum())


@pytest.mark.slow
def test_accelerate_launches_a_script_that_loads_an_adapter(folder: Path) -> None:
    script = folder / "script.py"
    script.write_text(
        "import sys\n"
        "from accelerate import PartialState\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(f\"{PartialState().process_index} {model.peft_config['default'].peft_type.value}\\n\", end='')\n"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    out = run([*launch, "--num_machines", "1", "-m", "peft_spp", str(script), str(folder / "adapter")], folder)
    assert "0 SPP" in out.splitlines()
