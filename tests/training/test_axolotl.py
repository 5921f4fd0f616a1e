# SPDX-License-Identifier: Apache-2.0
"""The plug-in for Axolotl, with Axolotl's own manager of plug-ins, check of its configuration, and loader."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel

from peft_spp import SPPConfig

from helpers.tiny import randomize, tiny_llama


# before it is imported: it sends reports of its use
os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
base = pytest.importorskip("axolotl.integrations.base")
loader = pytest.importorskip("axolotl.loaders.adapter")
PLUGIN = "peft_spp.axolotl.SPPPlugin"
IDS = torch.arange(10)[None]


@pytest.fixture(autouse=True)
def manager() -> Iterator[object]:
    manager = base.PluginManager.get_instance()
    manager.register(PLUGIN)
    assert PLUGIN in manager.plugins
    yield manager
    manager.plugins.clear()


def configuration(**settings: object) -> object:
    from axolotl.utils.dict import DictDefault

    return DictDefault({"adapter": "spp", **settings})


def test_a_configuration_with_the_adapter_is_valid(manager) -> None:
    from axolotl.integrations.config import merge_input_args
    from axolotl.utils.schemas.peft import LoraConfig

    assert manager.supports_adapter("spp")
    assert LoraConfig.model_validate({"adapter": "spp"}).adapter == "spp"
    _, inputs = merge_input_args()
    assert {"adapter", "spp", "base_model"} <= inputs.model_fields.keys()
    manager.plugins.clear()
    with pytest.raises(ValueError, match="not built in"):
        LoraConfig.model_validate({"adapter": "spp"})


def test_axolotl_s_loader_adds_a_new_adapter() -> None:
    cfg = configuration(spp={"r": 4, "target_modules": ["q_proj"], "spp_alpha": 8})
    model, config = loader.load_adapter(tiny_llama(), cfg, "spp")
    assert isinstance(model, PeftModel) and isinstance(config, SPPConfig)
    assert (config.r, config.spp_alpha, config.task_type) == (4, 8, "CAUSAL_LM")
    trained = [name for name, one in model.named_parameters() if one.requires_grad]
    assert trained and all("q_proj.spp_" in name for name in trained)
    none, config = loader.load_adapter(tiny_llama(), cfg, "spp", config_only=True)
    assert none is None and config.r == 4


@pytest.mark.parametrize("inference", [True, False])
def test_it_loads_a_saved_one(tmp_path: Path, inference: bool) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    model, _ = loader.load_adapter(tiny_llama(), configuration(), "spp")
    randomize(model)
    expected = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    cfg = configuration(lora_model_dir=str(tmp_path / "adapter"))
    loaded, config = loader.load_adapter(tiny_llama(), cfg, "spp", inference=inference)
    assert torch.equal(loaded(input_ids=IDS).logits, expected) and isinstance(config, SPPConfig)
    assert any(one.requires_grad for one in loaded.parameters()) is not inference


def test_other_adapters_are_left_to_axolotl(manager) -> None:
    assert manager.load_adapter(tiny_llama(), SimpleNamespace(adapter="lora")) is None


def test_a_setting_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="speed"):
        loader.load_adapter(tiny_llama(), configuration(spp={"speed": 2}), "spp")
