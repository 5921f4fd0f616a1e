# SPDX-License-Identifier: Apache-2.0
"""The memory that compressing while loading takes, measured in a process that does nothing else."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_spp.compressed.checkpoint_run import compress_checkpoint


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc"),
]

MIB = 1 << 20

_LOAD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
import peft_spp
from peft_spp import BitmaskConfig

torch.set_num_threads(1)
def memory(what):
    line = next(line for line in open("/proc/self/status") if line.startswith(what))
    return int(line.split()[1]) * 1024

def settings(folder):
    return {} if folder.endswith(" compressed") else {"quantization_config": BitmaskConfig()}

# what is imported at the first use
AutoModelForCausalLM.from_pretrained(sys.argv[2], **settings(sys.argv[2]))
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = memory("VmRSS")
model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], dtype=getattr(torch, sys.argv[3]), **settings(sys.argv[1])
)
tensors = [*model.parameters(), *model.buffers()]
print(json.dumps({
    "peak": memory("VmHWM") - before,
    "model": sum(one.numel() * one.element_size() for one in tensors),
}))
"""


def prune_and_save(model, folder):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".layers." in name and parameter.ndim > 1:
                for one in parameter if parameter.ndim == 3 else [parameter]:
                    one[torch.rand(one.shape) < 0.75] = 0.0
    model.save_pretrained(folder)
    return sum(one.numel() * one.element_size() for one in model.parameters())


def pruned(folder, **settings):
    defaults = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    config = LlamaConfig(**{**defaults, "num_attention_heads": 8, "num_key_value_heads": 8, **settings})
    return prune_and_save(LlamaForCausalLM(config).to(torch.bfloat16), folder)


def pruned_mixture(kind, folder, **settings):
    defaults = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 8}
    config = AutoConfig.for_model(kind, **{**defaults, **heads, **settings})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    for one in model.parameters():
        torch.nn.init.ones_(one)
    return prune_and_save(model, folder)


def measured(model, small, dtype):
    result = subprocess.run(
        [sys.executable, "-c", _LOAD, str(model), str(small), dtype],
        capture_output=True,
        text=True,
        check=True,
        timeout=900,
    )
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_loading_never_holds_the_dense_model(tmp_path, dtype):
    big = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 10, "num_attention_heads": 16}
    dense = pruned(tmp_path / "model", **big)
    assert dense > 1000 * MIB
    pruned(tmp_path / "small")
    found = measured(tmp_path / "model", tmp_path / "small", dtype)
    assert found["model"] < 0.35 * dense
    largest = 2048 * 8192 * 2
    assert found["peak"] <= found["model"] + largest + 300 * MIB, {name: one / MIB for name, one in found.items()}
    # the bound means something: the dense model would not fit into it
    assert found["model"] + largest + 300 * MIB < dense


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_loading_a_mixture_never_holds_more_than_one_dense_stack(tmp_path, kind, compressed):
    big = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 4}
    dense = pruned_mixture(kind, tmp_path / "model", **big)
    pruned_mixture(kind, tmp_path / "small")
    if compressed:
        for name in ("model", "small"):
            compress_checkpoint(tmp_path / name, tmp_path / f"{name} compressed")
            shutil.rmtree(tmp_path / name)
    folders = [tmp_path / (f"{name} compressed" if compressed else name) for name in ("model", "small")]
    found = measured(*folders, "bfloat16")
    assert found["model"] < 0.35 * dense
    largest = 8 * 2 * 6144 * 2048 * 2
    assert found["peak"] <= found["model"] + largest + 300 * MIB, {name: one / MIB for name, one in found.items()}
    # a second stack would not fit into it, and less than half of the dense model does
    assert largest > 300 * MIB
    assert found["model"] + largest + 300 * MIB < 0.7 * dense
