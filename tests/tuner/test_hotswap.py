# SPDX-License-Identifier: Apache-2.0
"""The weights of a loaded adapter replaced in place."""

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_spp import (
    SPPConfig,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)

from helpers.tiny import prune_, randomize, tiny_llama
from helpers.tiny_moe import PARAMETERS, tiny_moe
from helpers.unchanged import refused


IDS = torch.arange(10).view(1, 10)


def save(folder, seed, base=None, adapter="default", **settings):
    """A random adapter in a folder, and its logits."""
    config = SPPConfig(**{"r": 4, "task_type": "CAUSAL_LM", **settings})
    model = get_peft_model(base if base is not None else tiny_llama(), config).eval()
    torch.manual_seed(seed)
    randomize(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".spp_" not in name:
                parameter.normal_()
        model.save_pretrained(folder)
        return model(input_ids=IDS).logits


def load(folder, base=None, **kwargs):
    return PeftModel.from_pretrained(base if base is not None else tiny_llama(), folder, **kwargs).eval()


def tensors(model):
    return {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    "settings", [{}, {"spp_alpha": 3, "alpha_pattern": {"q_proj": 11}}, {"modules_to_save": ["lm_head"]}]
)
def test_the_model_becomes_that_of_the_new_adapter_in_place(tmp_path, settings):
    shared = {name: value for name, value in settings.items() if name == "modules_to_save"}
    first = save(tmp_path / "first", 1, **shared)
    second = save(tmp_path / "second", 2, **settings)
    model = load(tmp_path / "first", adapter_name="mine")
    assert torch.equal(logits(model), first) and not torch.allclose(first, second)
    before = tensors(model)
    hotswap_adapter(model, tmp_path / "second", "mine")
    assert torch.equal(logits(model), second)
    assert tensors(model) == before
    # saved again, it is the new one
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again" / "mine")), second)
    hotswap_adapter(model, tmp_path / "first", "mine")
    assert torch.equal(logits(model), first)


def test_the_other_adapters_stay(tmp_path):
    first, second, third = (save(tmp_path / str(seed), seed) for seed in (1, 2, 3))
    model = load(tmp_path / "1")
    model.load_adapter(tmp_path / "2", "other")
    hotswap_adapter(model, tmp_path / "3", "other")
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    assert torch.equal(logits(model), third) and not torch.allclose(third, second)


def test_an_optimizer_goes_on_with_the_parameters(tmp_path):
    save(tmp_path / "first", 1)
    save(tmp_path / "second", 2)

    def step(model, optimizer):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    model = load(tmp_path / "first", is_trainable=True)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    step(model, optimizer)
    hotswap_adapter(model, tmp_path / "second", "default")
    assert all(p.requires_grad for p in trainable)
    step(model, optimizer)
    fresh = load(tmp_path / "second", is_trainable=True)
    step(fresh, torch.optim.SGD([p for p in fresh.parameters() if p.requires_grad], lr=0.1))
    assert torch.equal(logits(model), logits(fresh))


def test_layers_that_the_new_adapter_leaves_out_become_the_base_again(tmp_path):
    save(tmp_path / "first", 1)
    second = save(tmp_path / "second", 2, target_modules=["q_proj", "down_proj"])
    model = load(tmp_path / "first")
    with pytest.warns(UserWarning, match="15 of the loaded"):
        hotswap_adapter(model, tmp_path / "second", "default")
    assert torch.equal(logits(model), second)
    merged = load(tmp_path / "second").merge_and_unload()
    for (name, ours), theirs in zip(model.merge_and_unload().named_parameters(), merged.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_transformers_model_with_an_adapter(tmp_path):
    save(tmp_path / "first", 1)
    second = save(tmp_path / "second", 2)
    model = tiny_llama()
    model.load_adapter(str(tmp_path / "first"))
    state_dict = load_file(tmp_path / "second" / "adapter_model.safetensors")
    before = tensors(model)
    hotswap_adapter_from_state_dict(model, state_dict, "default", SPPConfig.from_pretrained(tmp_path / "second"))
    assert torch.equal(logits(model), second) and tensors(model) == before


def test_fewer_row_blocks_take_the_place_of_more_without_preparation(tmp_path):
    first, second = save(tmp_path / "first", 1, r=8), save(tmp_path / "second", 2, r=2, spp_alpha=5)
    model = load(tmp_path / "first")
    before = tensors(model)
    hotswap_adapter(model, tmp_path / "second", "default")
    assert torch.equal(logits(model), second) and tensors(model) == before
    hotswap_adapter(model, tmp_path / "first", "default")
    assert torch.equal(logits(model), first)


def test_experts_are_prepared_and_swapped_expert_by_expert(tmp_path):
    settings = {"target_modules": [], "target_parameters": PARAMETERS, "task_type": None}
    save(tmp_path / "first", 1, base=tiny_moe("mixtral"), r=2, **settings)
    second = save(tmp_path / "second", 2, base=tiny_moe("mixtral"), r=8, **settings)
    model = load(tmp_path / "first", base=tiny_moe("mixtral"))
    first = logits(model)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert torch.equal(logits(model), first)
    hotswap_adapter(model, tmp_path / "second", "default")
    assert torch.equal(logits(model), second)
    hotswap_adapter(model, tmp_path / "first", "default")
    assert torch.equal(logits(model), first)


def edit(folder, change):
    path = folder / "adapter_model.safetensors"
    stored = load_file(path)
    change(stored)
    save_file(stored, path)


def set_nan(stored):
    stored[sorted(stored)[-1]][0] = float("nan")


@pytest.mark.parametrize(
    ("loaded", "new", "change", "error", "message"),
    [
        ({}, {"r": 5}, None, RuntimeError, "spp_A.*5.*4"),
        ({}, {"base": lambda: tiny_llama(intermediate_size=64)}, None, RuntimeError, "proj.*64.*48"),
        ({"target_modules": ["q_proj"]}, {}, None, RuntimeError, "unexpected keys.*down_proj"),
        ({"modules_to_save": ["lm_head"]}, {}, None, RuntimeError, "missing keys.*lm_head"),
        ({}, {}, lambda stored: stored.pop(sorted(stored)[0]), ValueError, "spp_A is missing"),
        ({}, {}, set_nan, ValueError, "NaN"),
        ({}, {"spp_dropout": 0.1}, None, ValueError, "spp_dropout"),
    ],
)
def test_what_does_not_fit_changes_nothing(tmp_path, loaded, new, change, error, message):
    first = save(tmp_path / "first", 1, **loaded)
    settings = {"base": tiny_llama, **new}
    save(tmp_path / "second", 2, **{**settings, "base": settings["base"]()})
    model = load(tmp_path / "first")
    if change:
        edit(tmp_path / "second", change)
    with refused(model, message, error), warnings.catch_warnings():
        warnings.simplefilter("error")
        hotswap_adapter(model, tmp_path / "second", "default")
    assert torch.equal(logits(model), first)


def test_a_merged_adapter_is_left_alone(tmp_path):
    first = save(tmp_path / "first", 1)
    second = save(tmp_path / "second", 2)
    model = load(tmp_path / "first")
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge"):
        hotswap_adapter(model, tmp_path / "second", "default")
    model.unmerge_adapter()
    assert torch.equal(logits(model), first)
    hotswap_adapter(model, tmp_path / "second", "default")
    assert torch.equal(logits(model), second)


def test_only_spp_takes_the_place_of_spp(tmp_path):
    save(tmp_path / "spp", 1)
    get_peft_model(tiny_llama(), LoraConfig()).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="LORA"):
        hotswap_adapter(load(tmp_path / "spp"), tmp_path / "lora", "default")
    with pytest.raises(ValueError, match="LoraConfig"):
        hotswap_adapter(load(tmp_path / "lora"), tmp_path / "spp", "default")
    with pytest.raises(ValueError, match="nobody"):
        hotswap_adapter(load(tmp_path / "spp"), tmp_path / "spp", "nobody")


def pruned(seed):
    model = tiny_llama()
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if "layers" in name and weight.dim() == 2:
            prune_(weight, "2:4")
    return model


def test_an_adapter_of_another_mask_is_told(tmp_path):
    save(tmp_path / "first", 1, base=pruned(0))
    save(tmp_path / "same", 2, base=pruned(0))
    save(tmp_path / "other", 3, base=pruned(1))
    model = load(tmp_path / "first", base=pruned(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hotswap_adapter(model, tmp_path / "same", "default")
    before = logits(model)
    with pytest.raises(ValueError, match="different masks"):
        hotswap_adapter(model, tmp_path / "other", "default", check_base="error")
    assert torch.equal(logits(model), before)
    with pytest.warns(UserWarning, match="different masks"):
        hotswap_adapter(model, tmp_path / "other", "default")
