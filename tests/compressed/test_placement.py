# SPDX-License-Identifier: Apache-2.0
"""Where compressed weights may be: on the host while a device computes; not on disk, nor split between processes."""

import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from transformers import AutoModelForCausalLM

import peft_spp
from peft_spp import BitmaskConfig, CompressedLinear, SPPConfig

from helpers.compressed_cases import IDS, pruned_llama


HERE = Path(__file__).parent
CPU = torch.device("cpu")
NAMES = [f"model.{name}" for name in ("embed_tokens", "layers.0", "layers.1", "layers.2", "norm", "rotary_emb")]
NAMES += ["lm_head"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folders of a dense model and the same compressed."""
    folder = tmp_path_factory.mktemp("models")
    pruned_llama().save_pretrained(folder / "dense")
    peft_spp.compress(pruned_llama()).save_pretrained(folder / "compressed")
    return folder / "dense", folder / "compressed"


def run_on(folders, script, processes):
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_TORCH_DEVICE": "cpu",
        "DS_ACCELERATOR": "cpu",
    }
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
    command = [sys.executable, *launcher, str(HERE / script), *map(str, folders)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-8000:]
    assert result.stdout.count("passed") == processes


@pytest.mark.slow
def test_transformers_may_not_split_them_between_processes(folders):
    run_on(folders, "tensor_parallel.py", 2)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_zero3_may_not_partition_them(folders):
    run_on(folders, "zero3.py", 1)


def test_a_model_that_is_split_is_not_compressed(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = pruned_llama()
        layer = model.model.layers[1].mlp.up_proj
        mesh = init_device_mesh("cpu", (1,))
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Replicate()]))
        with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj is not whole.*is a DTensor"):
            peft_spp.compress(model)
    finally:
        torch.distributed.destroy_process_group()
    assert not any(isinstance(one, CompressedLinear) for one in model.modules())


@pytest.mark.parametrize("device", ["disk", "meta", torch.device("meta")], ids=str)
@pytest.mark.parametrize("which", ["dense", "compressed"])
def test_a_device_without_memory_is_refused_by_name(folders, tmp_path, device, which):
    settings = {"quantization_config": BitmaskConfig()} if which == "dense" else {}
    device_map = {**dict.fromkeys(NAMES, "cpu"), "model.layers.1": device}
    for one in (device_map, {"": device}):
        name = "model.layers.1" if one is device_map else ""
        with pytest.raises(ValueError, match=rf"device_map has '{device}' for '{name}'.*`peft-spp decompress`"):
            AutoModelForCausalLM.from_pretrained(
                folders[which == "compressed"], device_map=one, offload_folder=tmp_path, **settings
            )


def test_a_device_map_that_needs_the_disk_is_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="device_map has 'disk' for"):
        AutoModelForCausalLM.from_pretrained(
            folders[1], device_map="auto", max_memory={"cpu": 60_000}, offload_folder=tmp_path
        )


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_a_device_map_puts_layers_on_the_host(folders, offload_buffers):
    # accelerate takes one for the device that computes, and the other for the host
    device_map = {**dict.fromkeys(NAMES, CPU), "model.layers.1": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(folders[1], device_map=device_map, offload_buffers=offload_buffers)
    layer = model.model.layers[1].mlp.up_proj
    assert layer.weight.is_meta and layer.bitmask.is_meta == offload_buffers
    assert torch.equal(model(IDS).logits, AutoModelForCausalLM.from_pretrained(folders[1])(IDS).logits)


@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.parametrize(
    "config", [SPPConfig(r=2, init_weights=False), LoraConfig(init_lora_weights=False)], ids=["spp", "lora"]
)
def test_adapters_compute_on_layers_on_the_host(offload_buffers, config):
    torch.manual_seed(0)
    models = [get_peft_model(peft_spp.compress(pruned_llama()), copy.deepcopy(config))]
    models.append(copy.deepcopy(models[0]))
    cpu_offload(models[1], CPU, offload_buffers=offload_buffers)
    layer = models[1].get_submodule("base_model.model.model.layers.1.self_attn.q_proj.base_layer")
    assert layer.weight.is_meta and layer.bitmask.is_meta == offload_buffers
    grads = []
    for one in models:
        x = one.get_input_embeddings()(IDS).detach().requires_grad_()
        one(inputs_embeds=x, labels=IDS).loss.backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.parametrize("offload", ["host", "disk"])
def test_loaded_models_compute_offloaded_and_are_not_decompressed(tmp_path, offload, offload_buffers):
    model = peft_spp.compress(pruned_llama())
    expected = model(IDS).logits
    if offload == "host":
        cpu_offload(model, CPU, offload_buffers=offload_buffers)
    else:
        disk_offload(model, tmp_path, CPU, offload_buffers=offload_buffers)
    assert model.model.layers[2].mlp.up_proj.weight.is_meta
    assert torch.equal(model(IDS).logits, expected)
    before = dict(model.named_modules())
    for function in (peft_spp.decompress, lambda one: one.dequantize()):
        with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj has no data in memory"):
            function(model)
    assert dict(model.named_modules()) == before
    assert model.is_quantized
