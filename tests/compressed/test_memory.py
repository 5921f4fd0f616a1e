# SPDX-License-Identifier: Apache-2.0
"""The memory that compressing while loading takes, measured in a process that does nothing else."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


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

# what is imported at the first use
AutoModelForCausalLM.from_pretrained(sys.argv[2], quantization_config=BitmaskConfig())
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = memory("VmRSS")
model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], dtype=getattr(torch, sys.argv[3]), quantization_config=BitmaskConfig()
)
tensors = [*model.parameters(), *model.buffers()]
print(json.dumps({
    "peak": memory("VmHWM") - before,
    "model": sum(one.numel() * one.element_size() for one in tensors),
}))
"""


def pruned(folder, **settings):
    defaults = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    config = LlamaConfig(**{**defaults, "num_attention_heads": 8, "num_key_value_heads": 8, **settings})
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".layers." in name and parameter.ndim == 2:
                parameter[torch.rand(parameter.shape) < 0.75] = 0.0
    model.save_pretrained(folder)
    return sum(one.numel() * one.element_size() for one in model.parameters())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_loading_never_holds_the_dense_model(tmp_path, dtype):
    big = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 10, "num_attention_heads": 16}
    dense = pruned(tmp_path / "model", **big)
    assert dense > 1000 * MIB
    pruned(tmp_path / "small")
    result = subprocess.run(
        [sys.executable, "-c", _LOAD, str(tmp_path / "model"), str(tmp_path / "small"), dtype],
        capture_output=True,
        text=True,
        check=True,
        timeout=900,
    )
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["model"] < 0.35 * dense
    largest = 2048 * 8192 * 2
    assert found["peak"] <= found["model"] + largest + 300 * MIB, {name: one / MIB for name, one in found.items()}
    # the bound means something: the dense model would not fit into it
    assert found["model"] + largest + 300 * MIB < dense
