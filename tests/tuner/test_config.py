# SPDX-License-Identifier: Apache-2.0
import json
import re
import warnings

import pytest
from peft import PeftConfig, PeftModel, PeftType, get_peft_model

from peft_spp import SPPConfig

from helpers.tiny import MLP, tiny_llama


def test_defaults_are_those_the_authors_ran():
    config = SPPConfig()
    assert (config.r, config.spp_alpha, config.spp_dropout, config.bias) == (16, 32, 0.0, "none")
    assert config.peft_type is PeftType.SPP
    assert config.target_modules is None


def test_the_papers_setting_has_a_name_and_takes_other_settings():
    config = SPPConfig.paper(task_type="CAUSAL_LM", target_modules=["q_proj"])
    assert (config.r, config.spp_alpha / config.r, config.spp_dropout) == (16, 2, 0.05)
    assert (config.task_type, config.target_modules) == ("CAUSAL_LM", {"q_proj"})
    assert SPPConfig.paper(r=4, spp_alpha=8).r == 4
    assert SPPConfig.paper(spp_dropout=0.0) == SPPConfig()


@pytest.mark.parametrize(
    ("settings", "culprit"),
    [
        ({"r": 0}, "0"),
        ({"r": -3}, "-3"),
        ({"r": 2.5}, "2.5"),
        ({"r": True}, "True"),
        ({"rank_pattern": {"q_proj": 0}}, "q_proj"),
        ({"spp_dropout": 1.0}, "1.0"),
        ({"spp_dropout": -0.1}, "-0.1"),
        ({"bias": "lora_only"}, "lora_only"),
        ({"init_weights": "gaussian"}, "gaussian"),
        ({"target_modules": "q.*", "layers_to_transform": [0]}, "layers_to_transform"),
        ({"target_modules": "q.*", "layers_pattern": "layers"}, "layers_pattern"),
        ({"layers_pattern": "layers"}, "layers_pattern"),
        ({"task_type": "NOPE"}, "NOPE"),
    ],
)
def test_values_that_cannot_be_used_are_named(settings, culprit):
    with pytest.raises(ValueError, match=culprit.replace(".", r"\.")):
        SPPConfig(**settings)


def test_unknown_arguments_are_named():
    with pytest.raises(TypeError, match="lora_alpha"):
        SPPConfig(lora_alpha=8)


def test_layers_to_transform_zero_is_a_layer():
    assert (
        SPPConfig(target_modules=["q_proj"], layers_to_transform=0, layers_pattern="layers").layers_to_transform == 0
    )


def test_saved_and_loaded_config_is_equal(tmp_path):
    config = SPPConfig(
        r=8,
        spp_alpha=4.5,
        spp_dropout=0.05,
        target_modules=["q_proj", "v_proj"],
        exclude_modules=["lm_head"],
        rank_pattern={"q_proj": 4},
        alpha_pattern={"v_proj": 2},
        bias="spp_only",
        modules_to_save=["score"],
        layers_to_transform=[0, 2],
        layers_pattern=["layers"],
        trainable_token_indices=[1, 2],
    )
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "SPP"
    for cls in (SPPConfig, PeftConfig):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is SPPConfig
        assert loaded.to_dict() == config.to_dict()


def test_unknown_keys_of_a_saved_config_warn_as_in_PEFT(tmp_path):
    get_peft_model(MLP(), SPPConfig(r=8, target_modules=["lin0"])).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"later": 1, "sooner": None}))
    message = r"^Unexpected keyword arguments \['later', 'sooner'\] for class SPPConfig, these are ignored\."
    for load in (
        lambda: SPPConfig.from_pretrained(tmp_path),
        lambda: PeftConfig.from_pretrained(tmp_path),
        lambda: PeftModel.from_pretrained(MLP(), tmp_path).peft_config["default"],
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            config = load()
        found = [str(one.message) for one in caught if "Unexpected keyword" in str(one.message)]
        assert len(found) == 1 and re.match(message, found[0])
        assert config.r == 8 and "later" not in config.to_dict()


def test_the_file_of_a_config_is_its_dictionary_and_short(tmp_path):
    config = SPPConfig(r=8, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), config)
    model.save_pretrained(tmp_path)
    saved = {**model.peft_config["default"].to_dict(), "inference_mode": True}
    saved["target_modules"] = sorted(saved["target_modules"])
    assert SPPConfig.from_json_file(tmp_path / "adapter_config.json") == saved
    assert len((tmp_path / "adapter_config.json").read_text()) < 2000
    assert len(str(model.peft_config["default"])) < 2000
    assert len(model.peft_config["default"].base_record.masks) == 21


def test_json_that_is_not_a_config_gets_the_error_of_PEFT(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"foo": "bar", "baz": 123}')
    with pytest.raises(TypeError, match="SPPConfig config that is trying to be loaded is missing required keys"):
        SPPConfig.from_pretrained(tmp_path)


def test_a_bad_value_in_a_saved_config_is_refused(tmp_path):
    SPPConfig(r=8).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 0}))
    with pytest.raises(ValueError, match="`r`"):
        SPPConfig.from_pretrained(tmp_path)


def test_no_default_targets_without_transformer_blocks():
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(MLP(), SPPConfig())
