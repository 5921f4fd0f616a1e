# SPDX-License-Identifier: Apache-2.0
"""Single layers whose parameters are in memory only around the call of the module that owns them."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from peft_spp import SPPConfig
from peft_spp.tuner import Linear

from helpers import reference
from helpers.tiny import MLP, tiny_llama
from helpers.tiny_moe import PARAMETERS, tiny_moe


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def adapted(**settings) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(MLP(), SPPConfig(r=3, target_modules=["lin0", "lin1"], init_weights=False, **settings))


def sharded(model: nn.Module) -> nn.Module:
    """A copy with every linear module, of the base and of the factors, sharded on its own."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            fully_shard(module)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return model


def wrapped(model: nn.Module) -> FullyShardedDataParallel:
    """A copy with FSDP1 around every linear module, and around the whole."""
    policy = ModuleWrapPolicy({nn.Linear})
    return FullyShardedDataParallel(
        copy.deepcopy(model), auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )


def step(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(1)
    y = model(x)
    y.square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [y.detach(), x.grad] + [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]


@pytest.mark.parametrize("shard", [sharded, wrapped])
@pytest.mark.parametrize("spp_dropout", [0.0, 0.3])
def test_modules_sharded_one_by_one_train_the_same(group, spp_dropout, shard):
    model = adapted(spp_dropout=spp_dropout)
    x = torch.randn(5, 12)
    expected = step(model, x.clone().requires_grad_())
    found = step(shard(model), x.clone().requires_grad_())
    assert len(found) == 6
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("bias", ["none", "spp_only", "all"])
def test_an_adapter_saved_from_modules_that_fsdp1_wraps_is_whole(group, bias):
    model = adapted(bias=bias)
    expected = get_peft_model_state_dict(model)
    wrapper = wrapped(model)
    saved = get_peft_model_state_dict(wrapper.module, state_dict=wrapper.state_dict())
    assert saved.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in saved.items())


def test_sharded_weights_are_merged_for_good(group):
    model = adapted()
    x = torch.randn(5, 12)
    shards = sharded(model)
    expected = model.merge_and_unload()
    merged = shards.merge_and_unload(safe_merge=True)
    for name, parameter in merged.named_parameters():
        assert isinstance(parameter, DTensor)
        assert torch.equal(parameter.full_tensor(), expected.get_parameter(name))
    assert torch.equal(merged(x), expected(x))


def test_a_broken_adapter_changes_no_sharded_weight(group):
    model = adapted()
    model.base_model.model.lin1.spp_B["default"].weight.data[2] = float("nan")
    shards = sharded(model)
    with pytest.raises(ValueError, match="lin1"):
        shards.merge_and_unload(safe_merge=True)
    for name, parameter in model.named_parameters():
        assert torch.equal(shards.get_parameter(name).full_tensor().nan_to_num(), parameter.nan_to_num())


def test_merging_sharded_weights_with_an_unmerge_to_come_is_refused(group):
    shards = sharded(adapted())
    with pytest.raises(RuntimeError, match=r"lin0(.|\n)*merge_and_unload"):
        shards.merge_adapter()
    assert shards.get_model_status().merged_adapters == []


def test_merging_and_unmerging_while_fsdp2_has_unsharded_the_weights(group):
    model = adapted()
    shards = sharded(model)
    model.merge_adapter()
    modules = [module for module in shards.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.unshard()
    shards.merge_adapter(safe_merge=True)
    for name, parameter in model.named_parameters():
        assert torch.equal(shards.get_parameter(name), parameter)
    model.unmerge_adapter()
    shards.unmerge_adapter()
    for module in modules:
        module.reshard()
    for name, parameter in model.named_parameters():
        assert torch.equal(shards.get_parameter(name).full_tensor(), parameter)


def reshard(model: nn.Module) -> None:
    """As at the end of a backward pass; after a forward pass, an outermost module stays unsharded."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_that_fsdp2_discards_is_told_by_name(group, whole, dtype):
    model = adapted()
    x = torch.randn(5, 12)
    shards = copy.deepcopy(model)
    policy = MixedPrecisionPolicy(param_dtype=dtype)
    if whole:
        fully_shard(shards, mp_policy=policy)
    else:
        for module in [one for one in shards.modules() if isinstance(one, nn.Linear)]:
            fully_shard(module, mp_policy=policy)
    expected = shards(x)
    reshard(shards)
    before = {name: one.full_tensor().clone() for name, one in shards.named_parameters()}
    for module in shards.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    shards.merge_adapter()
    if whole:
        torch.testing.assert_close(shards(x), expected, rtol=0.05, atol=0.05)  # nothing is lost yet
    reshard(shards)
    lost = r"lin0' was lost(.|\n)*reshard"
    for use in (lambda: shards(x), shards.merge_and_unload, lambda: shards(x)):
        with pytest.raises(RuntimeError, match=lost):
            use()
        reshard(shards)
    shards.unmerge_adapter()
    torch.testing.assert_close(shards(x), expected, rtol=0, atol=0)
    reshard(shards)
    for name, one in shards.named_parameters():
        assert torch.equal(one.full_tensor(), before[name]), name


def test_a_merge_into_experts_that_fsdp2_discards_is_told_by_name(group):
    config = SPPConfig(r=2, target_modules=[], target_parameters=PARAMETERS, init_weights=False)
    model = fully_shard(get_peft_model(tiny_moe("mixtral"), config))
    x = torch.arange(12).reshape(2, 6)
    expected = model(x).logits
    reshard(model)
    model.unshard()
    model.merge_adapter()
    torch.testing.assert_close(model(x).logits, expected, rtol=1e-3, atol=1e-3)  # nothing is lost yet
    reshard(model)
    with pytest.raises(RuntimeError, match=r"experts.* was lost(.|\n)*reshard"):
        model(x)
    reshard(model)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("whole", [False, True])
def test_unloading_a_merge_that_fsdp2_would_discard_is_refused(group, whole):
    model = adapted()
    shards = fully_shard(copy.deepcopy(model)) if whole else sharded(model)
    modules = [module for module in shards.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.unshard()
    with pytest.raises(RuntimeError, match=r"unsharded(.|\n)*lin0(.|\n)*`reshard\(\)` first"):
        shards.merge_and_unload()
    shards.merge_adapter()
    with pytest.raises(RuntimeError, match=r"unsharded(.|\n)*lin0(.|\n)*`reshard\(\)` first"):
        shards.merge_and_unload()
    shards.unmerge_adapter()
    reshard(shards)
    merged, expected = shards.merge_and_unload(), model.merge_and_unload()
    for name, parameter in expected.named_parameters():
        assert torch.equal(merged.get_parameter(name).full_tensor(), parameter)


def test_merging_and_unmerging_while_fsdp1_has_summoned_the_weights(group):
    model = adapted()
    wrapper = wrapped(model)
    x = torch.randn(5, 12)
    expected = model(x)
    model.merge_adapter()
    with FullyShardedDataParallel.summon_full_params(wrapper):
        wrapper.module.merge_adapter()
        for name in ("lin0", "lin1"):
            found = wrapper.module.base_model.model.get_submodule(name).get_base_layer()
            assert torch.equal(found.weight, model.base_model.model.get_submodule(name).get_base_layer().weight)
        wrapper.module.unmerge_adapter()
    torch.testing.assert_close(wrapper(x), expected)


def test_a_new_adapter_records_the_masks_of_sharded_weights(group):
    base = MLP()
    base.lin0.weight.data[:, ::2] = 0.0
    expected = get_peft_model(copy.deepcopy(base), SPPConfig(r=3, target_modules=["lin0"]))
    fully_shard(base.lin0)
    model = get_peft_model(base, SPPConfig(r=3, target_modules=["lin0"]))
    assert model.peft_config["default"].base_record == expected.peft_config["default"].base_record
    assert expected.peft_config["default"].base_record.masks["lin0"].zeros


@pytest.mark.parametrize("linear", ["self_attn.q_proj", "mlp.down_proj"])
def test_tensor_parallel_layers_are_refused_by_name(group, linear):
    model = tiny_llama()
    name = f"model.layers.1.{linear}"
    layer = model.get_submodule(name)
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(ValueError, match=f"{name}.*tensor parallel"):
        get_peft_model(model, SPPConfig(r=4))
    assert not any(isinstance(module, Linear) for module in model.modules())


def test_hooks_of_the_base_layer_see_what_they_see_after_merging():
    seen: dict[str, list[torch.Tensor]] = {"unmerged": [], "merged": []}
    model = adapted().double()
    layer = model.base_model.model.lin0
    key = "unmerged"
    layer.base_layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))

    def halve(module, args, output):
        seen[key].append(output.detach())
        return output / 2

    layer.base_layer.register_forward_hook(halve)
    x = torch.randn(5, 12, dtype=torch.double)
    unmerged = model(x)
    model.merge_adapter()
    key = "merged"
    torch.testing.assert_close(model(x), unmerged)
    torch.testing.assert_close(seen["unmerged"], seen["merged"])


def test_a_forward_pass_set_on_the_base_layer_is_kept():
    layer = adapted().double().base_model.model.lin0
    linear = layer.base_layer.forward
    layer.base_layer.forward = lambda x: linear(x) + 7
    x = torch.randn(5, 12, dtype=torch.double)
    expected = reference.linear(x, layer.get_base_layer().weight, layer.bias, layer.get_factors(["default"])) + 7
    torch.testing.assert_close(layer(x), expected)
    assert layer.base_layer.forward(x) is not None and "forward" in layer.base_layer.__dict__


def test_hooks_on_the_factors_and_a_tuner_layer_in_between():
    torch.manual_seed(0)
    model = get_peft_model(MLP(), LoraConfig(r=2, target_modules=["lin0"], init_lora_weights=False)).double()
    model = get_peft_model(model.base_model.model, SPPConfig(r=3, target_modules=["lin0"], init_weights=False))
    layer = model.base_model.model.lin0
    x = torch.randn(5, 12, dtype=torch.double)
    expected = layer(x)
    called = []
    for module in (layer.spp_A["default"], layer.spp_B["default"], layer.get_base_layer()):
        module.register_forward_hook(lambda module, args, output: called.append(module))
    torch.testing.assert_close(layer(x), expected)
    # the base layer is called by the layer in between, and around the update
    assert len(called) == 4
    assert all("forward" not in module.__dict__ for module in called)
