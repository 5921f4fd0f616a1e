# SPDX-License-Identifier: Apache-2.0
"""Adapters on models whose modules are wrapped: by activation checkpointing, `torch.compile` or `DataParallel`."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper

from peft_spp import SPPConfig, hotswap_adapter
from peft_spp.tuner import Linear

from helpers.tiny import MLP, prune_, randomize
from helpers.tiny_moe import IDS as MOE_IDS
from helpers.tiny_moe import PARAMETERS, tiny_moe


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(12, 20), "down_proj": nn.Linear(20, 12)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp["down_proj"](self.mlp["up_proj"](self.norm(x)).relu())


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(12, 6)
        for name, weight in self.named_parameters():
            if "_proj.weight" in name:
                prune_(weight.data, "2:4")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


X = torch.randn(3, 12, generator=torch.Generator().manual_seed(2))


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def both(module: nn.Module) -> nn.Module:
    return compiled(checkpoint_wrapper(module))


WRAPPERS = {"checkpointed": checkpoint_wrapper, "offloaded": offload_wrapper, "compiled": compiled, "both": both}


@pytest.fixture(params=["checkpointed", "compiled"])
def wrap(request):
    """Wraps every block of a model in place."""

    def wrap_blocks(model: nn.Module) -> nn.Module:
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        layers = inner.layers if isinstance(inner, Blocks) else inner.model.layers
        for index, block in enumerate(layers):
            layers[index] = WRAPPERS[request.param](block)
        return model

    yield wrap_blocks
    torch._dynamo.reset()


def adapted(model: nn.Module, **settings) -> PeftModel:
    model = get_peft_model(model, SPPConfig(r=4, **settings))
    torch.manual_seed(1)
    randomize(model)
    return model


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(X)


SETTINGS = {
    "default": {},
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r"layers\.[01]\.mlp\.\w+_proj"},
    "full name": {"target_modules": ["layers.1.mlp.up_proj"]},
    "layer": {"target_modules": ["up_proj"], "layers_to_transform": [2], "layers_pattern": "layers"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["layers.0.mlp.up_proj"]},
    "patterns": {"rank_pattern": {"layers.0.mlp.up_proj": 2}, "alpha_pattern": {r"layers.1.mlp.\w+": 5.0}},
    "bias": {"bias": "all"},
    "saved": {"modules_to_save": ["head"]},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_adapter_has_the_same_names_and_settings_on_wrapped_blocks(wrap, tmp_path, settings, when):
    plain = adapted(Blocks(), **settings)
    model = adapted(wrap(Blocks()), **settings) if when == "before" else wrap(adapted(Blocks(), **settings))
    for folder, one in (("plain", plain), ("wrapped", model)):
        one.save_pretrained(tmp_path / folder)
    expected, found = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("plain", "wrapped"))
    assert expected and found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert model.peft_config["default"].to_dict() == plain.peft_config["default"].to_dict()
    assert set(model.base_model.relate_base().values()) == {"same"}
    if not settings:  # running a compiled model takes a second
        torch.testing.assert_close(outputs(model), outputs(plain))
    loaded = PeftModel.from_pretrained(Blocks(), tmp_path / "wrapped")
    assert torch.equal(outputs(loaded), outputs(plain))


@pytest.mark.parametrize("wrap", ["offloaded", "both"], indirect=True)
def test_other_wrappers_and_several(wrap):
    expected = get_peft_model_state_dict(adapted(Blocks()))
    for model in (adapted(wrap(Blocks())), wrap(adapted(Blocks()))):
        found = get_peft_model_state_dict(model)
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
        set_peft_model_state_dict(model, {name: tensor + 1 for name, tensor in expected.items()})
        found = get_peft_model_state_dict(model)
        assert all(torch.equal(tensor, expected[name] + 1) for name, tensor in found.items())


@pytest.mark.parametrize("settings", [{}, {"bias": "spp_only"}, {"modules_to_save": ["head"]}])
def test_an_adapter_loads_into_wrapped_blocks(wrap, tmp_path, settings):
    plain = adapted(Blocks(), **settings)
    plain.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(wrap(Blocks()), tmp_path)
    assert set(loaded.base_model.relate_base().values()) == {"same"}
    torch.testing.assert_close(outputs(loaded), outputs(plain))
    other = wrap(adapted(Blocks(), **settings))
    randomize(other, scale=0.1)
    set_peft_model_state_dict(other, get_peft_model_state_dict(plain))
    torch.testing.assert_close(outputs(other), outputs(plain))


def test_a_state_dict_with_or_without_the_wrappers_parts(wrap, tmp_path):
    plain = adapted(Blocks())
    expected = get_peft_model_state_dict(plain)
    model = wrap(adapted(Blocks()))
    raw = {name: tensor for name, tensor in model.named_parameters()}
    for state_dict in (None, plain.state_dict(), raw, {f"module.{k}": t for k, t in plain.state_dict().items()}):
        found = get_peft_model_state_dict(model, state_dict=state_dict)
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_modules_to_save_inside_wrapped_blocks_are_saved(wrap):
    settings = {"modules_to_save": ["norm"]}
    expected = get_peft_model_state_dict(adapted(Blocks(), **settings))
    for model in (wrap(adapted(Blocks(), **settings)), adapted(wrap(Blocks()), **settings)):
        for state_dict in (None, adapted(Blocks(), **settings).state_dict()):
            assert get_peft_model_state_dict(model, state_dict=state_dict).keys() == expected.keys()
    assert sum(".norm." in name for name in expected) == 6


def test_adapters_without_a_peft_model(wrap):
    expected = get_peft_model_state_dict(adapted(Blocks()))
    config = SPPConfig(r=4, target_modules=["up_proj", "down_proj"])
    names = {name.removeprefix("base_model.model."): tensor for name, tensor in expected.items()}
    model = inject_adapter_in_model(config, wrap(Blocks()), state_dict=names)
    assert sum(isinstance(module, Linear) for module in model.modules()) == 6
    result = set_peft_model_state_dict(model, expected)
    assert not result.unexpected_keys and not [name for name in result.missing_keys if "spp_" in name]
    found = get_peft_model_state_dict(model)
    assert found.keys() == names.keys() and all(torch.equal(found[name], names[name]) for name in names)


def test_hot_swapping_and_merging_on_wrapped_blocks(wrap, tmp_path):
    plain = adapted(Blocks())
    plain.save_pretrained(tmp_path)
    model = wrap(adapted(Blocks()))
    randomize(model, scale=0.1)
    hotswap_adapter(model, str(tmp_path), "default")
    torch.testing.assert_close(outputs(model), outputs(plain))
    merged, expected = model.merge_and_unload(), plain.merge_and_unload()
    weights = {name.replace("_orig_mod.", ""): tensor for name, tensor in merged.state_dict().items()}
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.state_dict().items())


def test_experts_in_wrapped_blocks(wrap):
    names = [f"model.layers.1.mlp.{parameter}" for parameter in PARAMETERS]
    settings = {"target_modules": [], "target_parameters": names}
    plain = adapted(tiny_moe("mixtral", pattern="2:4"), **settings)
    for model in (
        adapted(wrap(tiny_moe("mixtral", pattern="2:4")), **settings),
        wrap(adapted(tiny_moe("mixtral", pattern="2:4"), **settings)),
    ):
        found, expected = get_peft_model_state_dict(model), get_peft_model_state_dict(plain)
        assert len(expected) == 4 and found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert model.peft_config["default"].to_dict() == plain.peft_config["default"].to_dict()
        with torch.no_grad():
            torch.testing.assert_close(model(MOE_IDS).logits, plain(MOE_IDS).logits)


@pytest.mark.parametrize("wrapper", [checkpoint_wrapper, compiled, nn.DataParallel])
@pytest.mark.parametrize("targets", [["lin0", "lin1"], "all-linear", r"lin\d"])
def test_a_layer_that_is_wrapped_itself(wrapper, targets, tmp_path):
    torch.manual_seed(0)
    mlp = MLP()
    plain, model = copy.deepcopy(mlp), copy.deepcopy(mlp)
    model.lin0 = wrapper(model.lin0)
    x = torch.randn(3, 12)
    model(x)  # compiled without the adapter
    plain, model = (
        get_peft_model(one, SPPConfig(r=3, target_modules=targets, init_weights=False)) for one in (plain, model)
    )
    set_peft_model_state_dict(model, get_peft_model_state_dict(plain))
    found, expected = get_peft_model_state_dict(model), get_peft_model_state_dict(plain)
    assert len(expected) == 4 and found.keys() == expected.keys()
    torch.testing.assert_close(model(x), plain(x))
    assert model.peft_config["default"].base_record == plain.peft_config["default"].base_record
    with model.disable_adapter():
        torch.testing.assert_close(model(x), mlp(x))
    torch.testing.assert_close(model.merge_and_unload()(x), plain.merge_and_unload()(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("wrapper", [checkpoint_wrapper, compiled, nn.DataParallel])
def test_a_model_that_is_wrapped_as_a_whole(wrapper, tmp_path):
    plain, inner = adapted(Blocks()), adapted(wrapper(Blocks()))
    expected = get_peft_model_state_dict(plain)
    outer = adapted(Blocks())
    for model, state_dict in ((inner, inner.state_dict()), (outer, wrapper(outer).state_dict())):
        found = get_peft_model_state_dict(model, state_dict=state_dict)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    inner.save_pretrained(tmp_path)
    assert torch.equal(outputs(PeftModel.from_pretrained(Blocks(), tmp_path)), outputs(plain))
    torch._dynamo.reset()
