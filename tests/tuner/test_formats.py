# SPDX-License-Identifier: Apache-2.0
"""An adapter in the format of today loads, and gives what it gave when it was saved."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from peft_spp import SPPConfig
from peft_spp.tuner.config import FORMAT_VERSION


ADAPTERS = Path(__file__).parents[1] / "data" / "adapters"
FOLDER = ADAPTERS / "saved"

spec = importlib.util.spec_from_file_location("make_adapters", ADAPTERS / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)


def test_a_saved_adapter_loads(recwarn):
    expected = load_file(FOLDER / "expected.safetensors")
    outputs = expected.pop("outputs")
    model = PeftModel.from_pretrained(make.Base(), FOLDER).eval()
    torch.testing.assert_close(model(make.inputs()), outputs)
    assert model.base_model.relate_base("default") == {"q_proj": "same", "down_proj": "same"}
    merged = model.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)
        assert torch.equal(tensor == 0, expected[name] == 0), name
    assert not [warning for warning in recwarn if "peft_spp" in warning.filename or "adapter" in str(warning.message)]


def test_a_base_that_is_pruned_in_other_places_is_told():
    base = make.Base()
    pruned = base.q_proj.weight.data
    pruned[0], pruned[1] = pruned[1].clone(), pruned[0].clone()
    pruned[2, (pruned[2] != 0).nonzero()[0]] = 0.0  # so that there is one zero more as well
    base.down_proj.weight.data[0] = 0.0
    model = PeftModel.from_pretrained(base, FOLDER, check_base="off")
    assert model.base_model.relate_base("default") == {"q_proj": "different", "down_proj": "refined"}
    with pytest.raises(ValueError, match="q_proj"):
        PeftModel.from_pretrained(base, FOLDER, check_base="error")


def test_a_saved_adapter_is_saved_again_with_its_record(tmp_path):
    PeftModel.from_pretrained(make.Base(), FOLDER).save_pretrained(tmp_path)
    for name in ("adapter_config.json", "base_masks.json"):
        then, now = (json.loads((folder / name).read_text()) for folder in (FOLDER, tmp_path))
        # the script that saved it was another module than the test
        for changed in ("peft_version", "auto_mapping", "weights_id"):
            then.pop(changed, None), now.pop(changed, None)
        # settings that it does not have yet get their defaults
        later = {key: getattr(SPPConfig(), key) for key in now.keys() - then.keys()}
        assert now == then | later
    assert json.loads((FOLDER / "adapter_config.json").read_text())["format_version"] == FORMAT_VERSION


def test_what_is_saved_now_is_what_the_saved_adapter_holds(tmp_path):
    make.adapted().save_pretrained(tmp_path)
    saved, now = (load_file(folder / "adapter_model.safetensors") for folder in (FOLDER, tmp_path))
    assert saved.keys() == now.keys() and all(torch.equal(saved[name], now[name]) for name in now)
