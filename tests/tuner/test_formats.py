# SPDX-License-Identifier: Apache-2.0
"""An adapter saved in each format there has ever been loads, and gives what it gave then."""

import importlib.util
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

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


def test_what_is_saved_now_is_what_the_newest_format_holds(tmp_path):
    make.adapted().save_pretrained(tmp_path)
    newest, now = (load_file(f / "adapter_model.safetensors") for f in (FORMATS[-1], tmp_path))
    assert newest.keys() == now.keys() and all(torch.equal(newest[name], now[name]) for name in now)
