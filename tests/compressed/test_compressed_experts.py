# SPDX-License-Identifier: Apache-2.0
"""Experts whose zeros are not stored: what they compute, and models that are loaded already."""

import copy
import pickle

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import nn
from torch.nn.utils import parametrize

import peft_spp
from peft_spp.compressed.experts import CompressedExperts, find_compressed_stacks
from peft_spp.functional import Factors
from peft_spp.functional.bitmask import compress
from peft_spp.functional.compressed_stack import CompressedStack
from peft_spp.pruning import prune_magnitude
from peft_spp.sparsity import compare_sparsity, sparsity_report

from helpers import reference
from helpers.compressed_cases import same_bits, same_tensors
from helpers.mixtures import expert_weights, mixture
from helpers.tiny import block_linears, prune_
from helpers.tiny_moe import IDS


KINDS = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "llama4_text"]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 6e-3}
EXPERTS = 4
# each expert of the tokens, in groups for the third way
TOKENS = torch.tensor([3, 1, 1, 0, 3, 3, 1, 0, 0])

pytestmark = pytest.mark.filterwarnings("ignore:.*stay dense")  # the routers of Llama 4


def one_by_one(x, stack):
    y = torch.stack([F.linear(x, stack[torch.tensor(index)]) for index in range(EXPERTS)])
    return y[TOKENS, torch.arange(len(x))]


def one_by_one_turned(x, stack):
    y = torch.stack([x @ stack[index].T for index in range(EXPERTS)])
    return y[TOKENS, torch.arange(len(x))]


def each_token(x, stack):
    return torch.bmm(stack[TOKENS], x.unsqueeze(-1)).squeeze(-1).add_(0)


def each_token_turned(x, stack):
    return torch.bmm(x.unsqueeze(1), stack[TOKENS].transpose(1, 2)).squeeze(1).add_(0)


def all_at_once(x, stack):
    return torch.bmm(x.expand(EXPERTS, *x.shape), stack.mT)[TOKENS, torch.arange(len(x))]


def in_groups(x, stack):
    order = TOKENS.argsort(stable=True)
    ends = TOKENS.bincount(minlength=EXPERTS).cumsum(0).int()
    return F.grouped_mm(x[order], stack.transpose(-2, -1), offs=ends)[order.argsort()]


def otherwise(x, stack):
    return torch.einsum("tn,tmn->tm", x, stack[TOKENS] * 1)


WAYS = [one_by_one, one_by_one_turned, each_token, each_token_turned, all_at_once, in_groups, otherwise]


def pruned(kind, dtype=torch.float32):
    model = mixture(kind, dtype).eval()
    for weight in (*expert_weights(model).values(), *(one.weight for one in block_linears(model).values())):
        prune_(weight, "0.5")
    with torch.no_grad():
        for weight in expert_weights(model).values():
            weight[0, :3] = torch.tensor([-0.0, 0.0, 1e-7])  # which are easily lost
    return model


@given(
    way=st.sampled_from(WAYS),
    m=st.sampled_from([8, 16, 24]),
    n=st.sampled_from([16, 64, 72, 136]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    inputs_first=st.booleans(),
    adapters=st.integers(0, 2),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 9),
)
@settings(max_examples=300, deadline=None)
def test_whichever_way_experts_are_multiplied(way, m, n, dtype, inputs_first, adapters, density, seed):
    torch.manual_seed(seed)
    weight = torch.randn(EXPERTS, m, n).mul_(torch.rand(EXPERTS, m, n) < density).to(dtype)
    x = torch.randn(len(TOKENS), n).to(dtype).requires_grad_()
    factors = [
        Factors(torch.randn(EXPERTS * 3, n).requires_grad_(), torch.randn(EXPERTS * m, 1).requires_grad_(), 0.5)
        for _ in range(adapters)
    ]
    stored = compress(weight.mT.contiguous() if inputs_first else weight)
    stack = CompressedStack(stored, factors, inputs_first=inputs_first)
    assert stack.shape == ((EXPERTS, n, m) if inputs_first else (EXPERTS, m, n)) and stack.dtype == dtype
    y = way(x, stack.mT if inputs_first else stack)

    # W' is rounded once to the dtype of the weight, products and sums are float32, and y is rounded once
    expected, magnitude = [], []
    for token, expert in zip(x.detach(), TOKENS.tolist(), strict=True):
        own = [Factors(A.detach().chunk(EXPERTS)[expert], B.detach().chunk(EXPERTS)[expert], s) for A, B, s in factors]
        expected.append(reference.linear(token, weight[expert], None, own))
        positive = [Factors(A.abs(), B.abs(), s) for A, B, s in own]
        magnitude.append(reference.linear(token.abs(), weight[expert].abs(), None, positive))
    unit = torch.finfo(dtype).eps / 2
    inner = 1.01 * unit if adapters else 0.0
    operations = 6 + 2 * adapters + n
    limit = 1.001 * unit * torch.stack(expected).abs() + (inner + operations * 2**-24) * torch.stack(magnitude)
    assert y.dtype == dtype
    assert ((y.detach().double() - torch.stack(expected)).abs() <= limit).all()
    if density and (adapters or way is not otherwise):
        y.float().sum().backward()
        assert all(one.grad is not None for one in (x, *(t for A, B, _ in factors for t in (A, B))))


def test_nothing_of_a_stacks_size_is_kept_for_the_backward_pass():
    weight = torch.randn(EXPERTS, 64, 64).mul_(torch.rand(EXPERTS, 64, 64) < 0.5)
    x = torch.randn(len(TOKENS), 64, requires_grad=True)
    factors = [Factors(torch.randn(EXPERTS * 2, 64, requires_grad=True), torch.randn(EXPERTS * 64, 1), 0.5)]
    for way in (one_by_one, each_token, in_groups):
        for inputs_first in (False, True):
            for own in ([], factors):
                stack = CompressedStack(compress(weight), own, inputs_first=inputs_first)
                kept: list[torch.Tensor] = []
                with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):  # noqa: B023
                    way(x, stack.mT if inputs_first else stack).sum()
                floating = {id(one): one.numel() for one in kept if one.is_floating_point()}
                assert max(floating.values()) <= stack.weight.values.numel() < weight.numel()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_logits_and_gradients_are_the_dense_models(kind, implementation, dtype):
    model = pruned(kind, dtype)
    if kind == "llama4_text":
        if implementation != "eager":
            pytest.skip("its experts have one implementation")
    elif dtype == torch.float16 and implementation == "grouped_mm":
        pytest.skip("PyTorch multiplies no groups in float16 on the CPU")
    else:
        model.set_experts_implementation(implementation)
    small = peft_spp.compress(copy.deepcopy(model))
    assert len(find_compressed_stacks(small)) == 2 * sum(
        isinstance(module, CompressedExperts) for module in small.modules()
    )
    results = []
    for one in (model, small):
        for name, parameter in one.named_parameters():
            parameter.requires_grad_("norm" in name or "embed" in name)
        result = one(input_ids=IDS, labels=IDS)
        result.loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in one.parameters() if p.grad is not None])
        results.append((result, gradients.double()))
    (expected, gradient), (actual, own) = results
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual.loss, expected.loss, rtol=4 * tolerance, atol=4 * tolerance)
    if dtype == torch.float32:  # in half precision a rounding may choose another expert
        torch.testing.assert_close(actual.logits, expected.logits, rtol=4 * tolerance, atol=4 * tolerance)
        assert (own - gradient).norm() <= 4 * tolerance * gradient.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_experts_come_back_bit_for_bit(kind, dtype):
    model = pruned(kind, dtype)
    classes = {name: type(module) for name, module in model.named_modules()}
    small = peft_spp.compress(copy.deepcopy(model))
    stacks = find_compressed_stacks(small)
    assert stacks and all(name.rpartition(".")[2] in ("gate_up_proj", "down_proj") for name in stacks)
    for name, (module, own) in stacks.items():
        values = small.get_parameter(name)
        assert values.ndim == 1 and not values.requires_grad
        assert isinstance(module, classes[name.rpartition(".")[0]])
        assert values.numel() < 0.6 * model.get_parameter(name).numel()
        assert same_bits(module.dequantize(own), model.get_parameter(name))
    assert same_tensors(peft_spp.decompress(small).state_dict(), model.state_dict())
    assert {name: type(module) for name, module in small.named_modules()} == classes


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_loads_into_experts_with_other_places(assign):
    first, second = peft_spp.compress(pruned("mixtral")), mixture("mixtral")
    for weight in expert_weights(second).values():
        prune_(weight, "0.75")
    second = peft_spp.compress(second)
    first = peft_spp.decompress(first)
    for layer in block_linears(first).values():
        nn.init.normal_(layer.weight)
    first = peft_spp.compress(first)
    first.load_state_dict(second.state_dict(), assign=assign)
    assert same_tensors(peft_spp.decompress(first).state_dict(), peft_spp.decompress(second).state_dict())


def test_copies_and_pickles_are_compressed_too():
    small = peft_spp.compress(pruned("qwen2_moe"))
    expected = small(IDS).logits
    for one in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert find_compressed_stacks(one).keys() == find_compressed_stacks(small).keys()
        assert torch.equal(one(IDS).logits, expected)
        assert all(module is not small.get_submodule(name.rpartition(".")[0])
                   for name, (module, _) in find_compressed_stacks(one).items())  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_a_compiled_model_computes_the_same(kind):
    small = peft_spp.compress(pruned(kind))
    expected = small(IDS).logits
    torch.testing.assert_close(torch.compile(small, backend="eager")(IDS).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_experts_that_are_to_be_trained_are_refused(kind):
    small = peft_spp.compress(pruned(kind))
    for module, _ in find_compressed_stacks(small).values():
        module.requires_grad_(True)
    with pytest.raises(ValueError, match="a compressed weight is frozen"):
        small(IDS)


def test_greedy_tokens_are_the_dense_models():
    model = pruned("qwen3_moe")
    small = peft_spp.compress(copy.deepcopy(model))
    arguments = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(small.generate(IDS, **arguments), model.generate(IDS, **arguments))


def test_what_cannot_be_compressed_stays_as_it_is():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.down_proj = nn.Parameter(torch.zeros(4, 8, 8))

        def forward(self, x):
            return x @ self.down_proj[0]

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = Experts()

        def forward(self, x):
            return self.experts(x)

    class ReadsThem(Block):
        def forward(self, x):
            return x @ self.experts.down_proj[1]

    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain, self.read, self.hooked, self.long = Block(), ReadsThem(), Block(), Block().double()
            self.full, self.replaced, self.computed, self.shared, self.again = (Block() for _ in range(5))
            nn.init.ones_(self.full.experts.down_proj)
            self.hooked.experts.register_forward_hook(lambda module, inputs, output: output)
            self.replaced.experts.forward = lambda x: x
            parametrize.register_parametrization(self.computed.experts, "down_proj", Twice())
            self.again.experts.down_proj = self.shared.experts.down_proj

    model = Model()
    with pytest.warns(UserWarning, match="6 layers stay dense") as told:
        peft_spp.compress(model)
    assert find_compressed_stacks(model).keys() == {"plain.experts.down_proj"}
    text = str(told[0].message)
    for name, reason in {
        "read": "it is read outside its module",
        "hooked": "its module has another forward pass",
        "replaced": "its module has another forward pass",
        "long": "its weight is torch.float64",
        "full": "0.0% zeros",
    }.items():
        assert f"{name}.experts.down_proj ({reason}" in text
    assert "computed.experts" in text and "shared" not in text
    x = torch.randn(3, 8)
    assert torch.equal(model.plain(x), torch.zeros(3, 8))


def test_which_experts_stay_dense_can_be_chosen():
    model = peft_spp.compress(pruned("mixtral"), modules_to_not_convert=["experts.down_proj", "lm_head"])
    assert {name.rpartition(".")[2] for name in find_compressed_stacks(model)} == {"gate_up_proj"}
    config = model.config.quantization_config
    assert "model.layers.0.mlp.experts.down_proj" in config.modules_to_not_convert
    with pytest.warns(UserWarning, match=r"12 layers stay dense: .* and 4 more"):
        model = peft_spp.compress(pruned("mixtral"), min_sparsity=0.9)
    assert not find_compressed_stacks(model)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_reports_count_compressed_experts_and_pruning_is_refused(kind):
    model = pruned(kind)
    small = peft_spp.compress(copy.deepcopy(model))
    assert sparsity_report(small).to_dict()["modules"] == sparsity_report(model).to_dict()["modules"]
    assert compare_sparsity(model, small).to_dict() == compare_sparsity(model, model).to_dict()
    only_experts = copy.deepcopy(model)
    peft_spp.compress(only_experts, modules_to_not_convert=["lm_head", *block_linears(model)])
    assert find_compressed_stacks(only_experts)
    for one in (small, only_experts):
        with pytest.raises(ValueError, match=r"is compressed: call peft_spp\.decompress\(model\) before pruning"):
            prune_magnitude(one, sparsity=0.5)


def test_a_model_without_data_is_refused():
    with torch.device("meta"):
        model = mixture("mixtral")
    with pytest.raises(ValueError, match="has no data"):
        peft_spp.compress(model)
    assert not find_compressed_stacks(model)
