# SPDX-License-Identifier: Apache-2.0
"""Models whose weights accelerate keeps on the host or on disk, and brings in for the time of a layer's call."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from peft_spp import SPPConfig

from helpers.tiny import prune_, randomize, tiny_llama


IDS = torch.arange(10).view(1, 10)
CPU = torch.device("cpu")
DEVICE_MAP = {
    name: "cpu" for name in ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
}
DEVICE_MAP |= {f"model.layers.{i}": "disk" for i in (1, 2)}


@pytest.fixture
def folders(tmp_path):
    """A saved base model and a saved adapter of it."""
    model = tiny_llama(initializer_range=0.3)
    for name, weight in model.named_parameters():
        if ".layers." in name and weight.dim() == 2:
            prune_(weight.data, "2:4")
    model.save_pretrained(tmp_path / "base")
    model = get_peft_model(model, SPPConfig(r=5, task_type="CAUSAL_LM"))
    randomize(model, scale=0.2)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path


@pytest.fixture
def model(folders):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders / "base"), folders / "adapter")


@pytest.fixture
def disk_model(folders):
    """The adapter on a base that is loaded with a device map which puts layers on disk."""
    base = AutoModelForCausalLM.from_pretrained(
        folders / "base", device_map=DEVICE_MAP, offload_folder=folders / "offloaded"
    )
    device_map = {f"base_model.model.{name}": device for name, device in DEVICE_MAP.items()}
    model = PeftModel.from_pretrained(
        base,
        folders / "adapter",
        device_map=device_map,
        offload_dir=folders / "offloaded_with_adapter",
        max_memory={"cpu": "1GB"},
    )
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    assert layer.base_layer.weight.is_meta and layer.spp_A["default"].weight.is_meta
    return model


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    # PEFT writes weights that it merges on disk below the current folder
    monkeypatch.chdir(tmp_path)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_offload_to_the_host(model):
    expected = logits(model)
    offloaded = cpu_offload(copy.deepcopy(model), CPU)
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    assert torch.equal(logits(offloaded), expected)


def test_offload_to_disk(model, tmp_path):
    expected = logits(model)
    disk_offload(model, tmp_path / "offload", CPU)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(logits(model), expected)


def test_device_map_with_layers_on_disk(model, disk_model):
    assert torch.equal(logits(disk_model), logits(model))
    with model.disable_adapter(), disk_model.disable_adapter():
        assert torch.equal(logits(disk_model), logits(model))


def test_mixed_batches_with_offloaded_weights(model):
    offloaded = cpu_offload(copy.deepcopy(model), CPU)
    ids = IDS.repeat(2, 1)
    expected = model(input_ids=ids, adapter_names=["default", "__base__"]).logits
    assert torch.equal(offloaded(input_ids=ids, adapter_names=["default", "__base__"]).logits, expected)


def test_the_masks_of_offloaded_weights_are_compared(disk_model):
    relations = disk_model.base_model.relate_base()
    assert len(relations) == 21 and set(relations.values()) == {"same"}


def test_merge_and_unload_with_layers_on_disk(model, disk_model):
    expected = logits(model.merge_and_unload())
    assert torch.equal(logits(disk_model.merge_and_unload(safe_merge=True)), expected)


def test_merge_and_unmerge_with_weights_on_the_host(model):
    unmerged = logits(model)
    offloaded = cpu_offload(copy.deepcopy(model), CPU)
    model.merge_adapter()
    offloaded.merge_adapter(safe_merge=True)
    assert torch.equal(logits(offloaded), logits(model))
    offloaded.unmerge_adapter()
    assert torch.equal(logits(offloaded), unmerged)


def test_disabling_a_merged_adapter_restores_weights_on_the_host(model):
    with model.disable_adapter():
        expected = logits(model)
    offloaded = cpu_offload(model, CPU)
    offloaded.merge_adapter()
    with offloaded.disable_adapter():
        assert torch.equal(logits(offloaded), expected)


def test_a_broken_adapter_is_not_merged_into_offloaded_weights(model):
    model.base_model.model.model.layers[2].mlp.down_proj.spp_B["default"].weight.data[3] = float("nan")
    offloaded = cpu_offload(model, CPU)
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.down_proj"):
        offloaded.merge_adapter(safe_merge=True)
    assert offloaded.get_model_status().merged_adapters == []


def test_merge_and_unmerge_with_layers_on_disk(model, disk_model):
    unmerged = logits(model)
    model.merge_adapter()
    disk_model.merge_adapter()
    assert torch.equal(logits(disk_model), logits(model))
    disk_model.unmerge_adapter()
    assert torch.equal(logits(disk_model), unmerged)
