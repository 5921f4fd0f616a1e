# SPDX-License-Identifier: Apache-2.0
"""All tensors of an adapter are saved, whatever its name, and what was saved last is loaded."""

import json
from pathlib import Path

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file

from peft_spp import SPPConfig

from helpers.tiny import randomize, tiny_llama
from helpers.unchanged import refused


CONFIG, MASKS, WEIGHTS = "adapter_config.json", "base_masks.json", "adapter_model.safetensors"
SMALL = {"num_hidden_layers": 2}


def living(**settings):
    return get_peft_model(tiny_llama(**SMALL), SPPConfig(r=4, task_type="CAUSAL_LM", **settings))


NAMES = [("default", "mlp"), ("layers", "0"), ("model", "q_proj"), ("self_attn", "default")]


@pytest.mark.parametrize("names", NAMES, ids="-".join)
@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_adapters_with_the_names_of_modules_are_saved_as_a_whole(tmp_path, names, modules_to_save):
    config = SPPConfig(r=4, task_type="CAUSAL_LM", modules_to_save=modules_to_save)
    model = get_peft_model(tiny_llama(**SMALL), config, adapter_name=names[0])
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    model.add_adapter(names[1], config)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trains
    randomize(model)
    model.save_pretrained(tmp_path)
    for name in names:
        folder = tmp_path / ("" if name == "default" else name)
        saved = load_file(folder / WEIGHTS)
        assert len(saved) == 28 + bool(modules_to_save)
        own = {key: p for key, p in model.named_parameters() if f".spp_A.{name}." in key or f".spp_B.{name}." in key}
        assert len(own) == 28
        for key, parameter in own.items():
            before, _, _ = key.rpartition(f".{name}.weight")
            assert torch.equal(saved[f"{before}.weight"], parameter), key
        PeftModel.from_pretrained(tiny_llama(**SMALL), folder, adapter_name=names[1])
        assert len(get_peft_model_state_dict(model, adapter_name=name)) == len(saved)


@pytest.mark.parametrize("name", ["weight", "spp_A", "base_layer", "modules_to_save", "_orig_mod"])
def test_names_that_PEFT_cannot_tell_from_those_of_tensors_are_refused(name):
    base = tiny_llama(**SMALL)
    with refused(base, repr(name)):
        get_peft_model(base, SPPConfig(r=4), adapter_name=name)


def test_a_transformers_model_saves_an_adapter_with_the_name_of_a_module(tmp_path):
    model = tiny_llama(**SMALL)
    model.add_adapter(SPPConfig(r=4), "default")
    model.add_adapter(SPPConfig(r=4), "mlp")
    for name in ("default", "mlp"):
        model.set_adapter(name)
        model.save_pretrained(tmp_path / name)
        assert len(load_file(tmp_path / name / WEIGHTS)) == 28
        assert len(json.loads((tmp_path / name / MASKS).read_text())["masks"]) == 14


def test_a_save_that_would_lose_tensors_writes_nothing(tmp_path):
    model = living()
    part = {name: tensor for name, tensor in model.state_dict().items() if "layers.1." not in name}
    with pytest.raises(RuntimeError, match=r"14 of the 28 .*layers\.1\."):
        model.save_pretrained(tmp_path / "part", state_dict=part)
    assert not [path for path in Path(tmp_path / "part").rglob("*") if path.is_file()]


def test_the_form_that_is_saved_last_is_loaded(tmp_path):
    ids = torch.arange(10).view(1, 10)
    model = living()
    for safe in (True, False, True, False):
        randomize(model)
        model.save_pretrained(tmp_path, safe_serialization=safe)
        expected = model.eval()(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(tiny_llama(**SMALL), tmp_path)
        assert torch.equal(loaded(input_ids=ids).logits, expected)
        model.load_adapter(tmp_path, "default")
        assert (tmp_path / WEIGHTS).exists() == safe and (tmp_path / "adapter_model.bin").exists() != safe
