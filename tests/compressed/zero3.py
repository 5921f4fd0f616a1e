# SPDX-License-Identifier: Apache-2.0
"""What `torchrun` starts in the test of ZeRO-3: compressing a model whose weights DeepSpeed has partitioned."""

from __future__ import annotations

import sys

import deepspeed
from deepspeed.ops import __compatible_ops__
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from peft_spp import BitmaskConfig, compress


# compiling its collectives for shared memory takes minutes, and gloo has them too
__compatible_ops__["deepspeed_shm_comm"] = False


def settings(stage: int) -> dict:
    return {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}


if __name__ == "__main__":
    dense, compressed = sys.argv[1:]
    deepspeed.init_distributed("gloo")
    partitioned = AutoModelForCausalLM.from_pretrained(dense)
    deepspeed.zero.Init(module=partitioned, config_dict_or_path=settings(3))
    before = dict(partitioned.named_modules())
    try:
        compress(partitioned)
    except ValueError as error:
        assert "model.layers.0.self_attn.q_proj is not whole in memory" in str(error) and "ZeRO-3" in str(error), error
    else:
        raise AssertionError("a partitioned model was compressed")
    assert dict(partitioned.named_modules()) == before

    in_force = HfDeepSpeedConfig(settings(3))  # as Transformers' trainer has it
    for folder, more in ((dense, {"quantization_config": BitmaskConfig()}), (compressed, {})):
        try:
            AutoModelForCausalLM.from_pretrained(folder, **more)
        except ValueError as error:
            assert "ZeRO-3" in str(error) and "peft-spp decompress" in str(error), error
        else:
            raise AssertionError(f"{folder} was loaded")
    in_force = HfDeepSpeedConfig(settings(2))
    AutoModelForCausalLM.from_pretrained(compressed)
    assert not in_force.is_zero3()
    print("passed")
