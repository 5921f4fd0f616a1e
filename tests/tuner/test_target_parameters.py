# SPDX-License-Identifier: Apache-2.0
"""The setting `target_parameters`: what it adapts, how it is loaded, and what is refused."""

import json
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_spp import SPPConfig

from helpers import reference
from helpers.expert_adapters import Holder, adapted, wrappers
from helpers.merge_cases import edit_json
from helpers.tiny import MLP, randomize, tiny, tiny_llama
from helpers.tiny_moe import IDS, MOE, PARAMETERS, tiny_moe
from helpers.unchanged import refused


ARCHITECTURES = pytest.mark.parametrize("name", list(MOE))


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
    edit_json(tmp_path / "adapter_config.json", rank_pattern={key: 3, "q_proj": 2})
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
    with refused(base, "size mismatch", kind=RuntimeError):
        PeftModel.from_pretrained(base, tmp_path)


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
    config = SPPConfig(r=2, target_modules=[], target_parameters=["experts.weight"], **settings)
    with refused(base, match):
        get_peft_model(base, config)


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
