# SPDX-License-Identifier: Apache-2.0
"""SPP on parameters: the fused experts of mixtures, whichever way they are stored."""

import copy
import itertools
import json
import re
import warnings

import pytest
import torch
from accelerate import disk_offload
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.utils import parametrize

from peft_spp import SPPConfig
from peft_spp.functional import Factors
from peft_spp.tuner import ParamWrapper

from helpers import reference
from helpers.tiny import MLP, is_positive_zero, randomize, tiny, tiny_llama
from helpers.tiny_moe import IDS, MOE, PARAMETERS, experts, oriented_experts, tiny_moe


ARCHITECTURES = pytest.mark.parametrize("name", list(MOE))


def adapted(model, r=4, adapter="default", **settings):
    """A PEFT model with random factors on all experts."""
    config = {"target_modules": [], "target_parameters": PARAMETERS, **settings}
    model = get_peft_model(model, SPPConfig(r=r, **config), adapter_name=adapter).eval()
    randomize(model)
    return model


def wrappers(model) -> dict[str, ParamWrapper]:
    return {m.module_name: m for m in model.modules() if isinstance(m, ParamWrapper)}


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


def test_adapters_can_be_added_switched_and_deleted():
    model = adapted(tiny_moe("mixtral"))
    first = model(input_ids=IDS).logits
    model.add_adapter("b", SPPConfig(target_modules=[], target_parameters=PARAMETERS, r=7))
    randomize(model, adapter="b")
    assert torch.equal(model(input_ids=IDS).logits, first)
    assert len(wrappers(model)) == 4
    model.set_adapter("b")
    second = model(input_ids=IDS).logits
    assert not torch.allclose(first, second)
    model.delete_adapter("default")
    assert torch.equal(model(input_ids=IDS).logits, second)
    assert not any(".default." in key for key, _ in model.named_parameters())
    base = model.unload()
    assert torch.equal(base(input_ids=IDS).logits, tiny_moe("mixtral")(input_ids=IDS).logits)
    assert list(base.state_dict()) == list(tiny_moe("mixtral").state_dict())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@ARCHITECTURES
def test_every_way_to_load_gives_the_same_logits(name, low_cpu_mem_usage, tmp_path):
    model = adapted(tiny_moe(name), 5, rank_pattern={"experts.down_proj": 3}, alpha_pattern={"gate_up_proj": 7})
    ranks = {key.rpartition(".")[2]: w.r["default"] for key, w in wrappers(model).items()}
    assert ranks == {"gate_up_proj": 5, "down_proj": 3}
    assert {w.scaling["default"] for w in wrappers(model).values()} == {7 / 5, 32 / 3}
    expected = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_moe(name), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(loaded(input_ids=IDS).logits, expected)
    loaded.load_adapter(tmp_path, "again", low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.set_adapter("again")
    assert torch.equal(loaded(input_ids=IDS).logits, expected)
    plain = tiny_moe(name)
    plain.load_adapter(str(tmp_path))
    assert torch.equal(plain(input_ids=IDS).logits, expected)


@pytest.mark.parametrize(
    "key", ["experts.down_proj", r"layers\.1\..*down_proj", "model.layers.0.mlp.experts.down_proj"]
)
def test_patterns_of_parameters_are_not_called_ignored(key, tmp_path):
    """PEFT looks for them among the modules alone."""
    rank_pattern, alpha_pattern = {key: 3, "q_proj": 2, "no_such": 4}, {key: 7}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = adapted(
            tiny_moe("mixtral"), 5, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern, target_modules=["q_proj"]
        )
    ignored = [str(one.message) for one in caught if "were ignored" in str(one.message)]
    assert ignored == [
        "The following rank_pattern keys did not match any targeted module and were ignored: ['no_such']."
    ]
    config = model.peft_config["default"]
    assert (config.rank_pattern, config.alpha_pattern) == (rank_pattern, alpha_pattern)
    ranks = {w.r["default"] for name, w in wrappers(model).items() if name.endswith("down_proj")}
    assert 3 in ranks and ranks <= {3, 5}
    expected = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"] == rank_pattern
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(
            {**json.loads((tmp_path / "adapter_config.json").read_text()), "rank_pattern": {key: 3, "q_proj": 2}}
        )
    )
    assert torch.equal(PeftModel.from_pretrained(tiny_moe("mixtral"), tmp_path).eval()(input_ids=IDS).logits, expected)


def test_factors_do_not_depend_on_what_the_base_was_used_for(tmp_path):
    adapted(tiny_moe("qwen3_moe")).save_pretrained(tmp_path)
    expected = PeftModel.from_pretrained(tiny_moe("qwen3_moe"), tmp_path).eval()(input_ids=IDS).logits
    used = adapted(tiny_moe("qwen3_moe"), target_parameters=["experts.gate_up_proj"])
    used(input_ids=IDS)
    loaded = PeftModel.from_pretrained(used.unload(), tmp_path).eval()
    assert torch.equal(loaded(input_ids=IDS).logits, expected)


def test_an_adapter_of_another_base_is_refused_and_the_base_left_alone(tmp_path):
    adapted(tiny_moe("mixtral")).save_pretrained(tmp_path)
    base = tiny_moe("mixtral", intermediate_size=20)
    modules = {key: id(module) for key, module in base.named_modules()}
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(base, tmp_path)
    assert {key: id(module) for key, module in base.named_modules()} == modules


def test_linear_layers_and_parameters_together():
    model = adapted(tiny_moe("gpt_oss"), target_modules=None)
    kinds = {type(m).__name__ for m in model.modules() if hasattr(m, "spp_A")}
    assert kinds == {"Linear", "ParamWrapper"}
    unmerged = model(input_ids=IDS).logits
    torch.testing.assert_close(model.merge_and_unload()(input_ids=IDS).logits, unmerged)


def test_a_router_is_adapted_if_it_is_asked_for():
    model = adapted(tiny_moe("mixtral", experts_implementation="eager").double(), target_parameters=["gate.weight"])
    (layer, *_) = wrappers(model).values()
    assert layer.spp_A["default"].weight.shape == (4, 32) and layer.spp_B["default"].weight.shape == (4, 1)
    weight = layer.get_base_layer().weight.detach().clone()
    expected = reference.effective_weight(weight, layer.get_factors(["default"]))
    torch.testing.assert_close(layer.merge() or layer.get_base_layer().weight.detach(), expected)


@pytest.mark.parametrize("conv1d", [False, True])
def test_the_weight_of_a_layer_is_adapted_as_the_layer_is(conv1d):
    class_name, settings, target = (
        ("GPT2LMHeadModel", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, "mlp.c_fc")
        if conv1d
        else ("LlamaForCausalLM", {**tiny_llama().config.to_dict()}, "gate_proj")
    )
    by_module = get_peft_model(
        tiny(class_name, **settings), SPPConfig(r=5, target_modules=[target], fan_in_fan_out=conv1d)
    )
    by_parameter = adapted(tiny(class_name, **settings), 5, target_parameters=[f"{target}.weight"])
    randomize(by_module.eval())
    state = {k: v for k, v in by_module.state_dict().items() if ".spp_" in k}
    assert not by_parameter.load_state_dict(state, strict=False).unexpected_keys
    torch.testing.assert_close(by_parameter(input_ids=IDS).logits, by_module(input_ids=IDS).logits)


def test_experts_of_llama4_are_known_to_be_stored_the_other_way():
    settings = {**MOE["gpt_oss"][1], "intermediate_size_mlp": 24}
    model = adapted(tiny("Llama4ForCausalLM", **settings))
    shapes = {(w.fan_in_fan_out, w.in_features, w.out_features) for w in wrappers(model).values()}
    assert shapes == {(True, 32, 48), (True, 24, 32)}


class Experts(nn.Module):
    """Experts of a model that is not Transformers'."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        return torch.einsum("bi,eoi->beo", x, self.weight)


class Holder(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.experts = Experts(weight)

    def forward(self, x):
        return self.experts(x)


@pytest.mark.parametrize(("told", "features"), [(None, (5, 7)), (False, (5, 7)), (True, (7, 5))])
def test_a_module_can_say_how_its_experts_are_stored(told, features):
    base = Holder(torch.randn(3, 7, 5))
    if told is not None:
        base.experts.is_transposed = told
    (layer,) = wrappers(adapted(base, 2, target_parameters=["experts.weight"])).values()
    assert (layer.in_features, layer.out_features) == features
    assert layer.unmerged_weight().shape == (3, features[1], features[0])


@pytest.mark.parametrize(
    ("weight", "settings", "match"),
    [
        (torch.randn(3, 7, 5), {"spp_dropout": 0.1}, "spp_dropout"),
        (torch.randn(3, 7, 5), {"fan_in_fan_out": True}, "fan_in_fan_out"),
        (torch.randn(7), {}, r"experts\.weight"),
        (torch.randn(2, 3, 7, 5), {}, r"experts\.weight"),
    ],
)
def test_what_cannot_be_adapted_is_refused_and_the_model_left_alone(weight, settings, match):
    base = Holder(weight)
    modules = {key: id(module) for key, module in base.named_modules()}
    config = SPPConfig(r=2, target_modules=[], target_parameters=["experts.weight"], **settings)
    with pytest.raises(ValueError, match=match):
        get_peft_model(base, config)
    assert {key: id(module) for key, module in base.named_modules()} == modules


def test_all_adapters_target_the_same_parameters():
    model = adapted(tiny_moe("mixtral"))
    with pytest.raises(ValueError, match="same set of parameters"):
        model.add_adapter("b", SPPConfig(target_modules=[], target_parameters=PARAMETERS[:1]))
    assert list(model.peft_config) == ["default"]
    with pytest.raises(TypeError, match="target_parameters"):
        SPPConfig(target_parameters="experts.down_proj")


def test_wrappers_that_a_deleted_adapter_has_left_are_not_nested_into():
    model = adapted(tiny_moe("mixtral"), target_parameters=PARAMETERS[:1])
    model.delete_adapter("default")
    with pytest.raises(ValueError, match="unload"):
        model.add_adapter("b", SPPConfig(target_modules=[], target_parameters=PARAMETERS[1:]))
    assert not any(".b." in key for key, _ in model.named_parameters()) and "b" not in model.peft_config


def test_mixed_batches_are_refused_as_loras_are():
    model = adapted(tiny_moe("mixtral"))
    with pytest.raises(ValueError, match="mixed adapter batches"):
        model(input_ids=IDS, adapter_names=["default", "__base__"])


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


def test_the_default_targets_leave_experts_out_and_say_so():
    with pytest.warns(UserWarning, match=r"mlp\.experts\.down_proj.*mlp\.experts\.gate_up_proj"):
        model = get_peft_model(tiny_moe("qwen3_moe"), SPPConfig(r=4))
    assert not wrappers(model)


def test_no_word_about_experts_where_there_is_nothing_to_say(recwarn, tmp_path):
    get_peft_model(tiny_llama(), SPPConfig(r=4))
    get_peft_model(tiny_moe("mixtral"), SPPConfig(r=4, target_parameters=[]))
    get_peft_model(tiny_moe("mixtral"), SPPConfig(r=4, target_parameters=PARAMETERS)).save_pretrained(tmp_path)
    PeftModel.from_pretrained(tiny_moe("mixtral"), tmp_path)
    assert not [w for w in recwarn if "experts" in str(w.message)]


def test_without_linear_layers_and_parameters_there_is_nothing_to_adapt():
    with pytest.raises(ValueError, match="target_parameters"):
        get_peft_model(MLP(), SPPConfig(r=2))
    with pytest.raises(ValueError, match="target_parameters"):
        get_peft_model(MLP(), SPPConfig(r=2, target_parameters=["nope"]))


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
