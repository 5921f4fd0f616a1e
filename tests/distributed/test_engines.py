# SPDX-License-Identifier: Apache-2.0
"""Two processes train as one does, under every engine; the adapter they save loads in a single process."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_task import ADAM, GLOBAL_BATCH, STEPS, adapter_config, factors, token_ids
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers.tiny import prune_, tiny_llama
from helpers.tiny_moe import PARAMETERS, tiny_moe


HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "benchmarks" / "configs"
# float32: the engines add up the gradients of the two halves of a batch in an order of their own
LOSSES = {"atol": 2e-6, "rtol": 2e-6}
FACTORS = {"atol": 1e-4, "rtol": 1e-4}
LOGITS = {"atol": 1e-5, "rtol": 1e-5}

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="the extra `deepspeed` is not installed"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    # weights that are large enough for the losses to tell one update from another
    model = tiny_llama(initializer_range=0.3)
    for name, weight in model.named_parameters():
        if ".layers." in name and weight.dim() == 2:
            prune_(weight.data, "2:4")
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return folder


def run_in_one_process(base: Path, **adapter: Any) -> tuple[list[float], PeftModel]:
    """The losses of the steps and the trained model, from a plain loop over the global batch."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), adapter_config(**adapter))
    model.load_state_dict(factors(model), strict=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **ADAM)
    ids = token_ids(GLOBAL_BATCH)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model


@pytest.fixture(scope="module")
def one_process(base) -> tuple[list[float], PeftModel]:
    return run_in_one_process(base)


def launch(*command: str) -> None:
    run = started(*command)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-8000:]


def started(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_TORCH_DEVICE": "cpu",
        "DS_ACCELERATOR": "cpu",
    }
    return subprocess.run(
        [sys.executable, "-m", *command], env=environment, capture_output=True, text=True, timeout=600
    )


def accelerate(config: str, script: str, *arguments: object) -> tuple[str, ...]:
    launcher = ("accelerate.commands.launch", "--config_file", str(CONFIGS / config), "--main_process_port", "0")
    return *launcher, str(HERE / script), *map(str, arguments)


def check(
    config: str,
    base: Path,
    output: Path,
    one_process: tuple[list[float], PeftModel],
    adapter: dict[str, Any] | None = None,
    **settings: bool,
) -> None:
    launch(*accelerate(config, "train.py", base, output, json.dumps(adapter or {}), json.dumps(settings)))
    losses, reference = one_process
    torch.testing.assert_close(json.loads((output / "losses.json").read_text()), losses, **LOSSES)
    assert losses[-1] < 0.9 * losses[0]

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), output / "adapter")
    record = loaded.peft_config["default"].base_record
    assert record == reference.peft_config["default"].base_record and record.masks
    trained = {name: p for name, p in reference.named_parameters() if ".spp_" in name}
    for name, parameter in loaded.named_parameters():
        if ".spp_" in name:
            torch.testing.assert_close(parameter.detach(), trained[name].detach(), **FACTORS)
    with torch.no_grad():
        logits = loaded(input_ids=token_ids(2)).logits
    torch.testing.assert_close(logits, torch.load(output / "logits.pt"), **LOGITS)

    merged = load_file(output / "merged.safetensors")
    expected = loaded.merge_and_unload().state_dict()
    assert merged.keys() == {name for name, weight in expected.items() if ".layers." in name and weight.ndim > 1}
    assert {name.removesuffix(".weight") for name in merged} >= record.masks.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in merged.items())


@pytest.mark.slow
def test_ddp(base, tmp_path, one_process):
    check("ddp.yaml", base, tmp_path, one_process)


@pytest.mark.slow
def test_fsdp1(base, tmp_path, one_process):
    check("fsdp1.yaml", base, tmp_path, one_process)


def test_fsdp2(base, tmp_path, one_process):
    check("fsdp2.yaml", base, tmp_path, one_process)


@pytest.mark.slow
@needs_deepspeed
def test_deepspeed_zero2(base, tmp_path, one_process):
    check("deepspeed_zero2.yaml", base, tmp_path, one_process)


@needs_deepspeed
def test_deepspeed_zero3(base, tmp_path, one_process):
    check("deepspeed_zero3.yaml", base, tmp_path, one_process)


@pytest.mark.slow
@needs_deepspeed
def test_deepspeed_zero3_with_gradient_checkpointing(base, tmp_path, one_process):
    check("deepspeed_zero3.yaml", base, tmp_path, one_process, gradient_checkpointing=True)


COMPRESSED = pytest.mark.parametrize(
    "config", ["ddp.yaml", "fsdp2.yaml", pytest.param("deepspeed_zero2.yaml", marks=needs_deepspeed)]
)


@pytest.mark.slow
@COMPRESSED
def test_compressed_weights(base, tmp_path, one_process, config):
    check(config, base, tmp_path, one_process, compressed=True)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    """A mixture whose experts are stored (in, out), which is not to be seen on a partitioned parameter."""
    folder = tmp_path_factory.mktemp("mixture")
    tiny_moe("gpt_oss", pattern="2:4").save_pretrained(folder)
    return folder


SHARDED = pytest.mark.parametrize(
    "config", ["fsdp2.yaml", pytest.param("deepspeed_zero3.yaml", marks=needs_deepspeed)], ids=["fsdp2", "zero3"]
)


@pytest.mark.slow
@SHARDED
def test_experts_with_sharded_parameters(mixture, tmp_path, config):
    adapter = {"target_parameters": PARAMETERS}
    check(config, mixture, tmp_path, run_in_one_process(mixture, **adapter), adapter)


@pytest.mark.slow
@COMPRESSED
def test_compressed_experts(mixture, tmp_path, config):
    adapter = {"target_parameters": PARAMETERS}
    check(config, mixture, tmp_path, run_in_one_process(mixture, **adapter), adapter, compressed=True)


@pytest.mark.slow
@SHARDED
@pytest.mark.parametrize("case", ["sound", "zeros", "values", "factor"])
def test_the_guard_watches_sharded_parameters(base, tmp_path, config, case):
    launch(*accelerate(config, "guard.py", base, tmp_path, case))
    assert {file.name for file in tmp_path.glob("*-?")} == {f"{case}-0", f"{case}-1"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    ["ddp.yaml", "fsdp2.yaml", pytest.param("deepspeed_zero3.yaml", marks=needs_deepspeed)],
    ids=["ddp", "fsdp2", "zero3"],
)
def test_a_killed_run_goes_on_from_its_checkpoint_as_if_it_had_not_been(base, tmp_path, config):
    launch(*accelerate(config, "resume.py", base, tmp_path / "unbroken", "null"))
    assert started(*accelerate(config, "resume.py", base, tmp_path / "killed", "3")).returncode != 0
    assert not (tmp_path / "killed" / "adapter").exists()
    assert (tmp_path / "killed" / "trainer" / "checkpoint-2").is_dir()
    launch(*accelerate(config, "resume.py", base, tmp_path / "killed", "null"))
    unbroken, resumed = (json.loads((tmp_path / run / "losses.json").read_text()) for run in ("unbroken", "killed"))
    assert resumed["resumed"] and not unbroken["resumed"]
    assert len(unbroken["losses"]) == STEPS and resumed["losses"] == unbroken["losses"]
    expected = load_file(tmp_path / "unbroken" / "adapter" / "adapter_model.safetensors")
    for name, tensor in load_file(tmp_path / "killed" / "adapter" / "adapter_model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.slow
def test_a_tensor_parallel_model_is_refused(base):
    launch("torch.distributed.run", "--standalone", "--nproc_per_node=2", str(HERE / "tensor_parallel.py"), str(base))


@pytest.mark.slow
@pytest.mark.parametrize("config", ["fsdp1.yaml", "fsdp2.yaml"])
def test_fsdp_with_activation_checkpointing(base, tmp_path, one_process, config):
    checkpointing = tmp_path / config
    settings = (CONFIGS / config).read_text()
    checkpointing.write_text(f"{settings.rstrip()}\n  fsdp_activation_checkpointing: true\n")
    check(str(checkpointing), base, tmp_path, one_process)


@pytest.mark.slow
@needs_deepspeed
def test_merging_and_adding_inside_gathered_parameters():
    run = started("torch.distributed.run", "--standalone", "--nproc_per_node=2", str(HERE / "zero3.py"))
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-8000:]
    assert run.stdout.count("passed: merge_and_unload") == 2
