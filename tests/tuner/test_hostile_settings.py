# SPDX-License-Identifier: Apache-2.0
"""Settings that somebody else has written: what is wrong with them is named, before the model is changed."""

import json
import subprocess

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model

from peft_spp import SPPConfig
from peft_spp.tuner.config import FORMAT_VERSION
from peft_spp.tuner.settings import Expression, check_patterns

from helpers.hostile_adapters import (
    CONFIG,
    WEIGHTS,
    assert_refused,
    saved,
)
from helpers.merge_cases import edit_json
from helpers.tiny import MLP, tiny_llama
from helpers.unchanged import refused


@pytest.fixture
def adapter(tmp_path):
    return saved(tmp_path / "adapter")


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 10**12},
        {"r": 2**20 + 1},
        {"r": "16"},
        {"rank_pattern": {"lin0": 10**12}},
        {"rank_pattern": [1]},
        {"spp_alpha": "32"},
        {"spp_alpha": True},
        {"alpha_pattern": {"lin0": None}},
        {"spp_dropout": None},
        {"target_modules": [["lin0"]]},
        {"target_modules": {"lin0": 1}},
        {"target_modules": "lin0("},
        {"target_modules": "(" * 2000},
        {"target_modules": "a{99999999999}"},
        {"target_modules": "a" * 200_000},
        {"exclude_modules": 3},
        {"exclude_modules": "*"},
        {"rank_pattern": {"(": 1}},
        {"alpha_pattern": {"[": 1}},
        {"modules_to_save": [1]},
        {"layers_to_transform": "all"},
        {"layers_to_transform": [0], "layers_pattern": ["("]},
        {"trainable_token_indices": [0.5]},
        {"trainable_token_indices": {"emb": "all"}},
        {"fan_in_fan_out": "yes"},
        {"bias": ["all"]},
        {"base_model_name_or_path": 3},
        {"auto_mapping": {"parent_library": 3}},
        {"task_type": "NOPE"},
        {"check_base": "never"},
        {"weights_id": 3},
        {"format_version": FORMAT_VERSION + 1},
        {"format_version": "1"},
    ],
    ids=lambda changes: json.dumps(changes)[:40],
)
def test_settings_that_cannot_be_used_are_named(adapter, changes):
    edit_json(adapter / CONFIG, **changes)
    assert_refused(adapter, "ersion" if "format_version" in changes else list(changes)[-1])


@pytest.mark.parametrize("number", ["1e999", "NaN", "-Infinity", "9" * 5000])
def test_numbers_that_json_does_not_have_are_refused(adapter, number):
    text = (adapter / CONFIG).read_text()
    (adapter / CONFIG).write_text(text.replace('"spp_alpha": 32', f'"spp_alpha": {number}'))
    assert_refused(adapter)


def test_a_key_that_is_there_twice_is_refused(adapter):
    text = (adapter / CONFIG).read_text()
    (adapter / CONFIG).write_text(text.replace("{", '{"r": 2, ', 1))
    assert_refused(adapter, CONFIG, "'r'")


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"3", b'"SPP"', b"{", b"\xff\xfe{}", b"[" * 100_000, b'{"a":' * 99_999, b'{"peft_type": 3}'],
)
def test_what_is_not_a_json_object_is_named(adapter, content):
    (adapter / CONFIG).write_bytes(content)
    with pytest.raises(ValueError, match=CONFIG):
        SPPConfig.from_pretrained(str(adapter))


SLOW = [
    {"target_modules": ".*.*.*.*.*.*.*.*.*!"},
    {"target_modules": "(([a-z0-9._]+)+)+!"},
    {"exclude_modules": "(([a-z0-9._]*)*)*!"},
    {"rank_pattern": {"(([a-z0-9._]+)+)+!": 2}},
    {"alpha_pattern": {"(([a-z0-9._]|[a-z])+)+!": 2}},
    {"layers_to_transform": [0], "layers_pattern": "(([a-z0-9._]+)+)+!"},
]


class Deep(torch.nn.Module):
    """A model with names as long as they are in language models."""

    def __init__(self):
        super().__init__()
        self.lin0, self.lin1 = torch.nn.Linear(12, 20), torch.nn.Linear(20, 6)
        self.a_transformer_with_a_long_name = torch.nn.ModuleDict({"layers_of_the_decoder_stack": MLP()})


@pytest.mark.parametrize("changes", SLOW, ids=lambda changes: next(iter(changes)))
def test_expressions_that_backtrack_for_ever_are_named(adapter, changes):
    edit_json(adapter / CONFIG, **changes)
    base = Deep()
    with refused(base, list(changes)[-1]):
        PeftModel.from_pretrained(base, adapter)


def test_expressions_of_every_day_are_taken_without_a_trial(monkeypatch):
    monkeypatch.setattr("subprocess.Popen", None)
    for pattern in ("lin0", r"^model\.layers\.0\.mlp$", ".*_proj", r"model\.(q|v)_proj", "(?:a|b)"):
        check_patterns([Expression("target_modules", pattern, whole=True)], ["a.b"])


def test_no_process_is_started_for_settings_that_come_from_no_file(adapter, monkeypatch):
    pattern = r"(\w+\.)*(\w+_)*lin[01]"
    edit_json(adapter / CONFIG, target_modules=pattern)
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr("subprocess.Popen", lambda *args, **kwargs: started.append(1) or popen(*args, **kwargs))
    get_peft_model(MLP(), SPPConfig(r=3, target_modules=pattern, rank_pattern={r"(\w+\.)*lin1": 2}))
    assert not started
    get_peft_model(MLP(), SPPConfig.from_pretrained(str(adapter)))
    assert started == [1]


def test_a_configuration_from_a_file_is_checked_however_it_is_used(adapter):
    edit_json(adapter / CONFIG, target_modules="(([a-z0-9._]+)+)+!")
    base = Deep()
    with refused(base, "target_modules"):
        get_peft_model(base, SPPConfig.from_pretrained(str(adapter)))


@pytest.mark.parametrize(
    "pattern",
    [
        r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
        r"(?:.*?(?:language|text).*?(?:attn|mlp).*?(?:k_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:q_proj|o_proj))",
        r"(\w+\.)*layers\.\d+\.(\w+\.)*(q|k|v)_proj",
    ],
)
def test_expressions_with_many_repetitions_that_come_to_an_end_are_taken(pattern):
    names = [f"base_model.model.model.language.layers.{i}.self_attn.{p}_proj" for i in range(80) for p in "qkvo"]
    check_patterns([Expression("target_modules", pattern, whole=True)], names)


def test_a_rank_that_the_weights_do_not_have_is_refused_before_memory_is_taken(adapter):
    edit_json(adapter / CONFIG, r=2**20)
    assert_refused(adapter, WEIGHTS, "lin0", 20, 3)


def test_settings_beside_the_weights_of_other_settings_are_refused(adapter, tmp_path):
    other = saved(tmp_path / "other", spp_alpha=64)
    (other / WEIGHTS).replace(adapter / WEIGHTS)
    assert_refused(adapter, WEIGHTS, CONFIG)


def test_settings_and_weights_of_two_saves_with_the_same_settings_belong_together(adapter, tmp_path):
    other = saved(tmp_path / "other")
    (other / WEIGHTS).replace(adapter / WEIGHTS)
    PeftModel.from_pretrained(MLP(), adapter)


def test_settings_may_be_edited(adapter):
    edit_json(adapter / CONFIG, spp_alpha=64)
    assert PeftModel.from_pretrained(MLP(), adapter).peft_config["default"].spp_alpha == 64


@pytest.fixture
def llama_adapter(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    model = AutoPeftModelForCausalLM._target_class.from_pretrained(tmp_path / "base")
    get_peft_model(model, SPPConfig(r=4, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_auto_classes_check_an_adapter_too(llama_adapter):
    edit_json(llama_adapter / CONFIG, r=5)
    with pytest.raises(ValueError, match=WEIGHTS):
        AutoPeftModelForCausalLM.from_pretrained(llama_adapter)


def test_transformers_checks_the_settings(llama_adapter):
    for changes in ({"r": 10**12}, {"exclude_modules": "(([a-z0-9._]+)+)+!"}, {"format_version": FORMAT_VERSION + 1}):
        text = (llama_adapter / CONFIG).read_text()
        edit_json(llama_adapter / CONFIG, **changes)
        model = tiny_llama()
        with refused(model):
            model.load_adapter(str(llama_adapter))
        (llama_adapter / CONFIG).write_text(text)
