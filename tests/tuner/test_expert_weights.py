# SPDX-License-Identifier: Apache-2.0
"""SPP on the experts of mixtures, whichever way they are stored: weights, gradients and merges are the formula."""

import copy
import itertools
import re

import pytest
import torch
from accelerate import disk_offload
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrize

from peft_spp import SPPConfig
from peft_spp.functional import Factors

from helpers import reference
from helpers.expert_adapters import Experts, Holder, adapted, wrappers
from helpers.tiny import is_positive_zero, randomize
from helpers.tiny_moe import IDS, MOE, PARAMETERS, experts, oriented_experts, tiny_moe


ARCHITECTURES = pytest.mark.parametrize("name", list(MOE))


def expected_experts(model, name, adapters=("default",)):
    """W' of every expert by the formula in plain loops, stored as the architecture stores it."""
    result = {}
    for key, stack in oriented_experts(model, name).items():
        layer = wrappers(model)[key]
        scaled = []
        for e, weight in enumerate(stack):
            factors = [
                Factors(
                    layer.spp_A[a].weight.chunk(len(stack))[e],
                    layer.spp_B[a].weight.chunk(len(stack))[e],
                    layer.scaling[a],
                )
                for a in adapters
            ]
            scaled.append(reference.effective_weight(weight, factors))
        scaled = torch.stack(scaled)
        result[key] = scaled.transpose(1, 2) if MOE[name][2] else scaled
    return result


def with_experts(model, weights):
    model = copy.deepcopy(model)
    with torch.no_grad():
        for key, stack in experts(model).items():
            stack.copy_(weights[key])
    return model


@ARCHITECTURES
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("r", [4, 5, 100])
def test_every_expert_has_the_weight_of_the_formula(name, implementation, r):
    # PyTorch's grouped matmul takes no float64
    base = tiny_moe(name).to(torch.float32 if implementation == "grouped_mm" else torch.float64)
    model = adapted(copy.deepcopy(base), r)
    for m in (base, model.get_base_model()):
        m.set_experts_implementation(implementation)
    expected = with_experts(base, expected_experts(model, name))(input_ids=IDS).logits
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, base(input_ids=IDS).logits)


@ARCHITECTURES
def test_the_factors_have_rows_for_every_expert(name):
    model = adapted(tiny_moe(name), 5)
    shapes = {key.rpartition(".")[2]: (w.spp_A["default"].weight.shape, w.spp_B["default"].weight.shape)
              for key, w in wrappers(model).items()}  # fmt: skip
    # 4 experts; gate and up have 24 rows each, of 32 inputs
    assert shapes == {"gate_up_proj": ((20, 32), (192, 1)), "down_proj": ((20, 24), (128, 1))}
    assert len(wrappers(model)) == 4


@ARCHITECTURES
def test_a_fresh_adapter_is_the_identity(name):
    base = tiny_moe(name)
    expected = base(input_ids=IDS).logits
    model = get_peft_model(base, SPPConfig(target_modules=[], target_parameters=PARAMETERS, r=4))
    assert torch.equal(model(input_ids=IDS).logits, expected)


@ARCHITECTURES
@pytest.mark.parametrize("r", [4, 5])
def test_gradients_are_those_of_the_formula(name, r):
    model = adapted(tiny_moe(name, experts_implementation="eager").double(), r).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    # the same loss, with W' made by differentiable plain operations and put in place of the parameters
    base, tensors, factors = tiny_moe(name, experts_implementation="eager").double().train(), {}, {}
    for key, wrapper in wrappers(model).items():
        A = wrapper.spp_A["default"].weight.detach().clone().requires_grad_()
        B = wrapper.spp_B["default"].weight.detach().clone().requires_grad_()
        factors[key] = (A, B)
        m = B.shape[0] // 4
        blocks = torch.repeat_interleave(torch.arange(r), torch.tensor(reference.block_sizes(m, r)))
        factor = 1 + wrapper.scaling["default"] * A.view(4, r, -1)[:, blocks] * B.view(4, m, 1)
        weight = dict(base.named_parameters())[key].detach()
        tensors[key] = weight * (factor.transpose(1, 2) if MOE[name][2] else factor)
    torch.func.functional_call(base, tensors, kwargs={"input_ids": IDS, "labels": IDS}).loss.backward()
    for key, (A, B) in factors.items():
        wrapper = wrappers(model)[key]
        assert A.grad.abs().max() > 0 and B.grad.abs().max() > 0
        torch.testing.assert_close(wrapper.spp_A["default"].weight.grad, A.grad)
        torch.testing.assert_close(wrapper.spp_B["default"].weight.grad, B.grad)


@ARCHITECTURES
def test_unmerge_restores_every_bit_and_merges_add_up_in_any_order(name):
    model = adapted(tiny_moe(name, pattern="0.5"), 5)
    model.add_adapter("b", SPPConfig(target_modules=[], target_parameters=PARAMETERS, r=3))
    randomize(model)
    before = {key: w.clone() for key, w in experts(model).items()}
    base_logits = tiny_moe(name, pattern="0.5")(input_ids=IDS).logits

    for names in (["default"], ["b"], ["b", "default"]):
        model.base_model.set_adapter(names)
        expected = model(input_ids=IDS).logits
        model.merge_adapter()
        # the forward pass uses the very weight that merging writes
        assert torch.equal(model(input_ids=IDS).logits, expected)
        model.unmerge_adapter()
        assert all(torch.equal(before[key], w) for key, w in experts(model).items())
    both = {}
    for order in itertools.permutations(["default", "b"]):
        for adapter in order:
            model.merge_adapter([adapter])
        both[order] = {key: w.clone() for key, w in experts(model).items()}
        with model.disable_adapter():
            assert torch.equal(model(input_ids=IDS).logits, base_logits)
        assert all(torch.equal(before[key], w) for key, w in experts(model).items())
    first, second = both.values()
    assert all(torch.equal(first[key], second[key]) for key in first)
    expected = expected_experts(model, name, ("default", "b"))
    for key, w in first.items():
        torch.testing.assert_close(w.double(), expected[key], rtol=1e-6, atol=1e-6)


@ARCHITECTURES
def test_safe_merge_of_a_broken_adapter_changes_nothing(name):
    model = adapted(tiny_moe(name, pattern="0.5"))
    before = {key: w.clone() for key, w in experts(model).items()}
    key, wrapper = list(wrappers(model).items())[-1]
    wrapper.spp_A["default"].weight.data[-1, 0] = float("nan")
    with pytest.raises(ValueError, match=re.escape(key)):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(before[key], w) for key, w in experts(model).items())
    merged = model.merge_and_unload()
    for key, w in experts(merged).items():
        assert is_positive_zero(w[before[key] == 0]).all()


def test_a_parametrized_parameter_is_scaled_but_not_merged():
    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    plain, base = Holder(torch.randn(3, 7, 5)), Holder(torch.zeros(3, 7, 5))
    with torch.no_grad():
        base.experts.weight.copy_(plain.experts.weight)
        plain.experts.weight *= 2
    parametrize.register_parametrization(base.experts, "weight", Double())
    x = torch.randn(4, 5)
    model, expected = (adapted(m, 2, target_parameters=["experts.weight"]) for m in (base, plain))
    model.load_state_dict({k: v for k, v in expected.state_dict().items() if ".spp_" in k}, strict=False)
    torch.testing.assert_close(model(x), expected(x))
    with pytest.raises(ValueError, match="parametrize"):
        model.merge_adapter()
    assert model.get_model_status().merged_adapters == []
    assert parametrize.is_parametrized(model.unload().experts, "weight")


def test_tied_experts_are_merged_each_with_its_own_adapter():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Experts(torch.randn(3, 7, 5)), Experts(torch.zeros(3, 7, 5))
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.a(x) + 3 * self.b(x)

    model = adapted(Tied(), 2, target_parameters=["a.weight", "b.weight"])
    x = torch.randn(4, 5)
    expected = model(x)
    with pytest.warns(UserWarning, match="shared"):
        merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
@ARCHITECTURES
def test_gradient_checkpointing_gives_the_same_gradients(name, use_reentrant):
    def gradients(checkpointing):
        model = adapted(tiny_moe(name)).train()
        randomize(model)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(input_ids=IDS, labels=IDS).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for a, b in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_more_is_kept_for_the_backward_pass_than_with_lora(dtype):
    def kept_bytes(config):
        model = get_peft_model(tiny_moe("mixtral", num_local_experts=16).to(dtype), config).train()
        own = {p.data_ptr() for p in model.parameters()}
        kept = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        return sum(size for size, _ in kept.values())

    settings = {"r": 4, "target_modules": [], "target_parameters": PARAMETERS}
    assert kept_bytes(SPPConfig(**settings)) <= kept_bytes(LoraConfig(**settings))


def test_weights_that_are_loaded_for_the_forward_pass_only_are_adapted(tmp_path):
    model = adapted(tiny_moe("mixtral"))
    expected = model(input_ids=IDS).logits
    for key, wrapper in wrappers(model).items():
        if not any(p.is_meta for p in wrapper.get_base_layer().parameters()):
            disk_offload(wrapper.get_base_layer(), tmp_path / key, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in experts(model).values())
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, expected)


def test_under_autocast_the_parameter_keeps_its_dtype():
    seen = []

    class Watched(Experts):
        def forward(self, x):
            seen.append(self.weight.dtype)
            return super().forward(x)

    base = nn.Sequential(Watched(torch.randn(3, 7, 5)))
    model = adapted(base, 2, target_parameters=["0.weight"])
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(4, 5)).sum().backward()
    assert seen == [torch.float32]


@pytest.mark.slow
@ARCHITECTURES
def test_a_compiled_model_trains_to_the_same_gradients_and_is_compiled_once(name):
    torch._dynamo.reset()
    model = adapted(tiny_moe(name)).train()
    expected = model(input_ids=IDS, labels=IDS).loss
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    compiled = torch.compile(model, backend="aot_eager")
    for step in range(3):
        model.zero_grad()
        torch._dynamo.utils.counters.clear()
        loss = compiled(input_ids=IDS, labels=IDS).loss
        loss.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close([p.grad for p in model.parameters() if p.requires_grad], gradients)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        # there are graph breaks around the experts, as with LoRA, but nothing that each step compiles anew
        assert graphs > 0 if step == 0 else graphs == 0
