# SPDX-License-Identifier: Apache-2.0
"""What `torchrun` starts in the test of tensor parallelism: an adapter on a model that Transformers has split."""

from __future__ import annotations

import sys

import torch
from distributed_task import adapter_config
from peft import get_peft_model
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM


if __name__ == "__main__":
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto")
    assert isinstance(model.model.layers[0].self_attn.q_proj.weight, DTensor)
    try:
        get_peft_model(model, adapter_config())
    except ValueError as error:
        assert "tensor parallel" in str(error) and "model.layers.0.self_attn.q_proj" in str(error)
    else:
        raise AssertionError("the split model was adapted")
    assert not any("spp_" in name for name, _ in model.named_modules())
    torch.distributed.destroy_process_group()
