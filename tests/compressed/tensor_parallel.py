# SPDX-License-Identifier: Apache-2.0
"""What `torchrun` starts in the test of tensor parallelism: loading a model that Transformers is to split."""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from peft_spp import BitmaskConfig, compress


def refused(what: str, folder: str, **settings) -> None:
    try:
        AutoModelForCausalLM.from_pretrained(folder, **settings)
    except ValueError as error:
        assert what in str(error) and "peft-spp decompress" in str(error), error
    else:
        raise AssertionError(f"{folder} was loaded with {settings}")


if __name__ == "__main__":
    dense, compressed = sys.argv[1:]
    refused("tp_size=2", dense, tp_plan="auto", quantization_config=BitmaskConfig())
    refused("tp_size=2", compressed, tp_plan="auto")
    refused("tp_size=2", compressed, distributed_config=DistributedConfig(tp_size=2))
    refused("fsdp_size=2", compressed, distributed_config=DistributedConfig(fsdp_size=2))
    model = AutoModelForCausalLM.from_pretrained(dense, tp_plan="auto")
    before = dict(model.named_modules())
    try:
        compress(model)
    except ValueError as error:
        assert "model.layers.0.self_attn.q_proj is not whole in memory" in str(error), error
    else:
        raise AssertionError("a split model was compressed")
    assert dict(model.named_modules()) == before
    print("passed")
    torch.distributed.destroy_process_group()
