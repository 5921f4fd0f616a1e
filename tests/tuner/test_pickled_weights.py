# SPDX-License-Identifier: Apache-2.0
"""Pickled weights, and adapters from the Hub: only plain weights are unpickled, from the Hub only with a flag."""

import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_spp import SPPConfig

from helpers.hostile_adapters import CONFIG, FACTOR, PICKLED, WEIGHTS, Trap, assert_refused, pickled, saved
from helpers.merge_cases import edit_json, edit_tensors
from helpers.tiny import MLP
from helpers.unchanged import refused


@pytest.fixture
def adapter(tmp_path):
    return saved(tmp_path / "adapter")


def test_pickled_weights_are_refused_unless_nothing_but_weights_is_unpickled(adapter):
    pickled(adapter)
    base = MLP()
    with refused(base, f"{PICKLED}.*weights_only=True"):
        PeftModel.from_pretrained(base, adapter, weights_only=False)


def test_pickled_weights_in_a_local_folder_are_loaded_as_peft_does(adapter):
    x = torch.randn(2, 12)
    base = MLP()
    expected = PeftModel.from_pretrained(MLP_like(base), adapter)(x)
    pickled(adapter)
    for flags in ({}, {"weights_only": True}):
        assert torch.equal(PeftModel.from_pretrained(MLP_like(base), adapter, **flags)(x), expected)

    model = get_peft_model(MLP_like(base), SPPConfig(r=2, target_modules=["lin1"]))
    model.load_adapter(adapter, "second")
    model.set_adapter("second")
    assert torch.equal(model(x), expected)


def MLP_like(model: MLP) -> MLP:
    like = MLP()
    like.load_state_dict(model.state_dict())
    return like


@pytest.mark.parametrize("content", ["trap", "list", "values", "nan", "cut", "pickle"])
def test_pickled_weights_with_anything_else_in_them_are_refused_with_the_flag_too(adapter, tmp_path, content):
    tensors = load_file(adapter / WEIGHTS)
    bad = {
        "trap": tensors | {"x": Trap(tmp_path / "trap")},
        "list": [torch.ones(2)],
        "values": {"a": 1},
        "nan": tensors | {FACTOR: torch.full((3, 12), float("nan"))},
    }
    pickled(adapter, bad.get(content))
    if content == "cut":
        (adapter / PICKLED).write_bytes((adapter / PICKLED).read_bytes()[:-100])
    if content == "pickle":
        (adapter / PICKLED).write_bytes(pickle.dumps(Trap(tmp_path / "trap")))
    assert_refused(adapter, PICKLED, weights_only=True)
    assert not (tmp_path / "trap").exists()


@pytest.fixture
def hub(adapter, tmp_path):
    """An adapter as the Hub's cache holds it after a download; it is found without a network."""
    repository = tmp_path / "cache" / "models--me--adapter"
    commit = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    return adapter.rename(repository / "snapshots" / commit), {"cache_dir": str(tmp_path / "cache")}


def test_an_adapter_from_the_hub_loads(hub):
    _, options = hub
    PeftModel.from_pretrained(MLP(), "me/adapter", **options)


@pytest.mark.parametrize("damage", ["cut", "nan", "pickled", "settings"])
def test_an_adapter_from_the_hub_is_checked_before_the_model_is_changed(hub, damage):
    folder, options = hub
    if damage == "cut":
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-4])
    elif damage == "nan":
        edit_tensors(folder / WEIGHTS, **{FACTOR: torch.full((3, 12), float("nan"))})
    elif damage == "pickled":
        pickled(folder)
    else:
        edit_json(folder / CONFIG, r=4)
    base = MLP()
    with refused(base, "adapter_model"):
        PeftModel.from_pretrained(base, "me/adapter", **options)


def test_pickled_weights_from_the_hub_are_loaded_with_a_flag(hub):
    folder, options = hub
    x, base = torch.randn(2, 12), MLP()
    expected = PeftModel.from_pretrained(MLP_like(base), "me/adapter", **options)(x)
    pickled(folder)
    model = get_peft_model(MLP_like(base), SPPConfig(r=2, target_modules=["lin1"]))
    with pytest.raises(ValueError, match=PICKLED):
        model.load_adapter("me/adapter", "second", **options)
    assert list(model.peft_config) == ["default"]
    model.load_adapter("me/adapter", "second", weights_only=True, **options)
    model.set_adapter("second")
    assert torch.equal(model(x), expected)
