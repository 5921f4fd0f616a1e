# SPDX-License-Identifier: Apache-2.0
"""What `torchrun` starts in the test of ZeRO-3: a gathered model, used as Transformers and TRL use one.

No model is trained: `deepspeed.zero.Init` partitions the layers as the trainer has it.
"""

from __future__ import annotations

import sys

import deepspeed
import pytest
import torch
from deepspeed.ops import __compatible_ops__
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from peft import PeftModel, get_peft_model
from torch import nn

from peft_spp import SPPConfig


sys.path.insert(0, __file__.rpartition("/distributed/")[0])

from helpers.tiny import MLP, prune_, randomize


# compiling its collectives for shared memory takes minutes, and gloo has them too
__compatible_ops__["deepspeed_shm_comm"] = False
CONFIG = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
TARGETS = ["lin0", "lin1"]


def base() -> MLP:
    torch.manual_seed(0)
    model = MLP()
    prune_(model.lin0.weight.data, "2:4")
    return model


def adapted(model: nn.Module) -> PeftModel:
    model = get_peft_model(model, SPPConfig(r=3, target_modules=TARGETS))
    torch.manual_seed(1)
    randomize(model)
    return model


def partitioned(model: nn.Module) -> nn.Module:
    """The same model, in partitions."""
    deepspeed.zero.Init(module=model, config_dict_or_path=CONFIG)
    assert all(p.ds_status is ZeroParamStatus.NOT_AVAILABLE for p in model.parameters())
    return model


def gathered(parameters, **settings):
    return deepspeed.zero.GatheredParameters(list(parameters), **settings)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "spp_" not in name}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def merge_read_and_unmerge_as_trl_does(plain: PeftModel, model: PeftModel) -> None:
    unmerged = weights(plain)
    plain.merge_adapter()
    with gathered(model.parameters()):
        model.merge_adapter(safe_merge=True)
        assert_equal(weights(model), weights(plain))
        weight = "base_model.model.lin0.base_layer.weight"
        assert not torch.equal(weights(model)[weight], unmerged[weight])
        model.unmerge_adapter()
        assert_equal(weights(model), unmerged)
    with gathered(model.parameters()):
        assert_equal(weights(model), unmerged)
    plain.unmerge_adapter()


def a_merge_that_stays(plain: PeftModel, model: PeftModel) -> None:
    unmerged = weights(plain)
    plain.merge_adapter()
    with gathered(model.parameters(), modifier_rank=0):
        model.merge_adapter()
    with gathered(model.parameters()):
        assert_equal(weights(model), weights(plain))
        x = torch.ones(2, 12)
        assert torch.equal(model(x), plain(x))
    model.unmerge_adapter()
    with gathered(model.parameters()):
        assert_equal(weights(model), unmerged)
    plain.unmerge_adapter()


def a_merge_that_is_lost_is_an_error(plain: PeftModel, model: PeftModel) -> None:
    with gathered(model.parameters()):
        model.merge_adapter()
    with pytest.raises(RuntimeError, match=r"'lin0' was lost(.|\n)*modifier_rank=0"):
        model(torch.ones(2, 12))
    model.unmerge_adapter()
    with gathered(model.parameters()):
        assert_equal(weights(model), weights(plain))


def a_layer_that_is_gathered_in_part(plain: PeftModel, model: PeftModel) -> None:
    for part in ("base_layer", "spp_A", "lin1"):
        with gathered(p for name, p in model.named_parameters() if part in name):
            for name in TARGETS:
                layer, expected = (getattr(one.base_model.model, name) for one in (model, plain))
                assert torch.equal(layer.get_delta_weight("default"), expected.get_delta_weight("default"))
            assert set(model.base_model.relate_base().values()) == {"same"}
            assert all(p.ds_status is ZeroParamStatus.AVAILABLE for n, p in model.named_parameters() if part in n)
    assert all(p.ds_status is ZeroParamStatus.NOT_AVAILABLE for p in model.parameters())
    for one, other in (TARGETS, reversed(TARGETS)):
        some = [parameter for name, parameter in model.named_parameters() if one in name]
        with gathered(some), pytest.raises(RuntimeError, match=other):
            model.merge_adapter()
    assert not any(getattr(model.base_model.model, name).merged for name in TARGETS)


def a_second_adapter(plain: PeftModel, model: PeftModel) -> None:
    config = SPPConfig(r=2, target_modules=TARGETS)
    plain.add_adapter("second", config)
    other = SPPConfig(r=2, target_modules=TARGETS)
    with gathered(model.parameters()):
        model.add_adapter("second", other)
    assert other.base_record == config.base_record and config.base_record.masks["lin0"].zeros == 120
    model.delete_adapter("second")
    plain.delete_adapter("second")


def weights_that_stay_in_memory(plain: PeftModel, model: PeftModel) -> None:
    """As DeepSpeed leaves small ones after a forward pass, without anybody having gathered them."""
    base_layer = model.base_model.model.lin0.base_layer
    base_layer.weight.ds_persist = True
    base_layer.weight.all_gather()
    assert base_layer.weight.ds_status is ZeroParamStatus.AVAILABLE
    with pytest.raises(RuntimeError, match="lin0"):
        model.merge_adapter()
    with gathered(model.parameters(), modifier_rank=0):
        model.merge_adapter()
        model.unmerge_adapter()
    found, expected = (one.base_model.model.lin0.get_delta_weight("default") for one in (model, plain))
    assert torch.equal(found, expected)


def merge_and_unload(plain: PeftModel, model: PeftModel) -> None:
    expected = weights(plain.merge_and_unload())
    with gathered(model.parameters(), modifier_rank=0):
        merged = model.merge_and_unload(safe_merge=True)
        assert_equal(weights(merged), expected)
    with gathered(merged.parameters()):
        assert_equal(weights(merged), expected)


CASES = (
    merge_read_and_unmerge_as_trl_does,
    a_merge_that_stays,
    a_merge_that_is_lost_is_an_error,
    a_layer_that_is_gathered_in_part,
    a_second_adapter,
    weights_that_stay_in_memory,
    merge_and_unload,
)


if __name__ == "__main__":
    deepspeed.init_distributed("gloo")
    plain, model = adapted(base()), partitioned(adapted(base()))
    for case in CASES:
        case(plain, model)
        print(f"passed: {case.__name__}")
