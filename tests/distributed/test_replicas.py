# SPDX-License-Identifier: Apache-2.0
"""Modules that hold plain tensors in place of parameters: in replicas of `DataParallel`, and where FSDP1 shards."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel

from peft_spp import SPPConfig

from helpers.tiny import MLP, randomize, tiny_llama
from helpers.tiny_moe import IDS, PARAMETERS, tiny_moe


class Stack(nn.Module):
    """Experts, their weights in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, 4))
        self.other = nn.Parameter(torch.randn(3, 5, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ti,eoi,epo->tp", x, self.weight, self.other)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.experts = Stack()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(self.linear(x))


def adapted_mixture() -> PeftModel:
    torch.manual_seed(0)
    targets = {"target_modules": ["linear"], "target_parameters": ["experts.weight", "experts.other"]}
    model = get_peft_model(Mixture(), SPPConfig(r=2, **targets))
    randomize(model)
    return model


def replica(model: nn.Module) -> nn.Module:
    """What `torch.nn.parallel.replicate` makes for a device, which it does for accelerators only."""
    modules = list(model.modules())
    copies = {module: module._replicate_for_data_parallel() for module in modules}
    tensors = {parameter: parameter * 1 for parameter in model.parameters()}
    for module, made in copies.items():
        for name, child in module._modules.items():
            made._modules[name] = None if child is None else copies[child]
        for name, parameter in module._parameters.items():
            if parameter is None:
                made._parameters[name] = None
            else:
                setattr(made, name, tensors[parameter])
    return copies[model]


def parallel_apply(replicas: list[nn.Module], inputs: list[torch.Tensor]) -> list:
    """As PyTorch's, a thread for each."""
    with ThreadPoolExecutor(len(replicas)) as threads:
        return list(threads.map(lambda one, x: one(x), replicas, inputs))


def gradients(model: nn.Module) -> list[torch.Tensor]:
    found = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    model.zero_grad()
    return found


def test_replicas_compute_and_train_what_the_model_does():
    model = adapted_mixture().double()
    xs = torch.randn(4, 6, 4, dtype=torch.double)
    expected = model(xs.flatten(0, 1)).unflatten(0, (4, 6))
    expected.square().sum().backward()
    wanted = gradients(model)
    replicas = [replica(model) for _ in xs]
    assert not any(True for _ in replicas[0].parameters())
    found = torch.stack(parallel_apply(replicas, list(xs)))
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    torch.testing.assert_close(gradients(model), wanted)
    with model.disable_adapter():
        expected = model(xs[0])
        torch.testing.assert_close(replica(model)(xs[0]), expected)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_replicas_of_a_mixture(name):
    model = get_peft_model(tiny_moe(name), SPPConfig(r=4, target_parameters=PARAMETERS, target_modules=["q_proj"]))
    randomize(model.eval())
    expected = model(IDS).logits
    for result in parallel_apply([replica(model) for _ in range(3)], [IDS] * 3):
        torch.testing.assert_close(result.logits, expected)


def test_replicas_of_linear_layers_and_of_merged_ones():
    model = get_peft_model(tiny_llama(), SPPConfig(r=4)).eval()
    randomize(model)
    ids = torch.arange(10).view(1, 10)
    expected = model(ids).logits
    torch.testing.assert_close(replica(model)(ids).logits, expected)
    model.merge_adapter()
    torch.testing.assert_close(replica(model)(ids).logits, expected)


def test_disabling_a_merged_adapter_in_a_replica_is_refused_by_name():
    model = get_peft_model(MLP(), SPPConfig(r=3, target_modules=["lin0"], init_weights=False))
    model.merge_adapter()
    with model.disable_adapter(), pytest.raises(ValueError, match=r"'lin0'(.|\n)*unmerge_adapter"):
        replica(model)(torch.randn(2, 12))


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_experts_in_fsdp1(group, use_orig_params, checkpointed):
    model = adapted_mixture()
    x = torch.randn(6, 4)
    expected = model(x)
    expected.square().sum().backward()
    wanted = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    sharded = copy.deepcopy(model)
    if checkpointed:
        sharded.base_model.model.experts = checkpoint_wrapper(sharded.base_model.model.experts)

    def policy(module, recurse, **_):
        # frozen and trained parameters apart, as PEFT's policy has it
        return recurse or isinstance(module, (Stack, nn.Linear))

    device = torch.device("cpu")
    sharded.zero_grad()
    settings = {"use_orig_params": use_orig_params, "device_id": device, "auto_wrap_policy": policy}
    for name, parameter in sharded.named_parameters():
        parameter.requires_grad_("spp_" in name)
    sharded = FullyShardedDataParallel(sharded, **settings)
    found = sharded(x)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    got = [p.grad for p in sharded.parameters() if p.grad is not None]
    total = sum(g.double().square().sum() for g in wanted)
    torch.testing.assert_close(sum(g.double().square().sum() for g in got), total)


def test_checkpointing_inside_the_adapter_is_refused_by_name():
    model = adapted_mixture()
    inner = model.base_model.model.experts.base_layer
    inner.base_layer = checkpoint_wrapper(inner.base_layer)
    with pytest.raises(RuntimeError, match=r"'experts\.\w+'(.|\n)*checkpointing"):
        model(torch.randn(6, 4))


@pytest.mark.parametrize("hook", ["hook", "forward"])
def test_experts_with_hooks_see_the_parameter_around_the_forward_pass(hook):
    model = adapted_mixture()
    x = torch.randn(6, 4)
    expected = model(x)
    stack, seen = model.base_model.model.experts.get_base_layer(), []
    if hook == "hook":
        stack.register_forward_pre_hook(lambda module, args: seen.append((module.weight, module.other)))
    else:
        own = stack.forward
        stack.forward = lambda x: seen.append((stack.weight, stack.other)) or own(x)
    assert torch.equal(model(x), expected)
    if hook == "hook":
        assert seen[0] == (stack._parameters["weight"], stack._parameters["other"])
    assert type(stack) is Stack
