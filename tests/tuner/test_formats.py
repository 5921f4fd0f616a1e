# SPDX-License-Identifier: Apache-2.0
"""An adapter saved in each format there has ever been loads, and gives what it gave then."""

import importlib.util
import json
from pathlib import Path

import peft
import pytest
import torch
from packaging.version import Version
from peft import PeftModel
from safetensors.torch import load_file

from peft_spp.tuner.adapter_tensors import SAVES_BY_MODULE
from peft_spp.tuner.config import FORMAT_VERSION


ADAPTERS = Path(__file__).parents[1] / "data" / "adapters"
FORMATS = sorted(ADAPTERS.glob("format-*"))

spec = importlib.util.spec_from_file_location("make_adapters", ADAPTERS / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)


def test_there_is_an_adapter_of_every_format():
    assert {folder.name for folder in FORMATS} == {f"format-{version}" for version in range(1, FORMAT_VERSION + 1)}


@pytest.mark.parametrize("folder", FORMATS, ids=lambda folder: folder.name)
def test_an_adapter_of_each_format_loads(folder, recwarn):
    expected = load_file(folder / "expected.safetensors")
    outputs = expected.pop("outputs")
    model = PeftModel.from_pretrained(make.Base(), folder).eval()
    torch.testing.assert_close(model(make.inputs()), outputs)
    assert set(model.base_model.relate_base("default").values()) == {"same"}
    merged = model.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)
        assert torch.equal(tensor == 0, expected[name] == 0), name
    assert not [warning for warning in recwarn if "peft_spp" in warning.filename or "adapter" in str(warning.message)]


@pytest.mark.parametrize("folder", FORMATS, ids=lambda folder: folder.name)
def test_a_base_that_is_pruned_in_other_places_is_told_whatever_the_format(folder):
    base = make.Base()
    pruned = base.q_proj.weight.data
    pruned[0], pruned[1] = pruned[1].clone(), pruned[0].clone()
    pruned[2, (pruned[2] != 0).nonzero()[0]] = 0.0  # so that there is one zero more as well
    base.down_proj.weight.data[0] = 0.0
    model = PeftModel.from_pretrained(base, folder, check_base="off")
    assert model.base_model.relate_base("default") == {"q_proj": "different", "down_proj": "refined"}
    with pytest.raises(ValueError, match="q_proj"):
        PeftModel.from_pretrained(base, folder, check_base="error")


@pytest.mark.parametrize("folder", FORMATS, ids=lambda folder: folder.name)
def test_an_adapter_of_each_format_is_saved_in_the_newest_and_keeps_its_record(folder, tmp_path):
    PeftModel.from_pretrained(make.Base(), folder).save_pretrained(tmp_path)
    then, now = (json.loads((f / "adapter_config.json").read_text()) for f in (folder, tmp_path))
    assert now["format_version"] == FORMAT_VERSION and now["base_record"] == then["base_record"]
    again = PeftModel.from_pretrained(make.Base(), tmp_path)
    assert set(again.base_model.relate_base("default").values()) == {"same"}


@pytest.mark.skipif(Version(peft.__version__) < SAVES_BY_MODULE, reason="this PEFT does not save SPP's biases")
def test_what_is_saved_now_is_what_the_newest_format_holds(tmp_path):
    make.adapted().save_pretrained(tmp_path)
    newest, now = (load_file(f / "adapter_model.safetensors") for f in (FORMATS[-1], tmp_path))
    assert newest.keys() == now.keys() and all(torch.equal(newest[name], now[name]) for name in now)
