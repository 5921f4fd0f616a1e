# SPDX-License-Identifier: Apache-2.0
"""Adapters that cannot be merged: what is wrong with them is named, and nothing is written."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_spp import SPPConfig
from peft_spp.merge import merge_checkpoint

from helpers.hostile_adapters import Trap
from helpers.merge_cases import (
    auto,
    edit_json,
    edit_tensors,
    llama_case,
    save_adapter,
    save_case,
)
from helpers.merge_refusals import ADAPTER, CONFIG, PREFIX, Q_PROJ, assert_refused
from helpers.tiny import MLP


def test_a_pickled_adapter_is_not_read(tmp_path, case):
    (case.adapter / ADAPTER).unlink()
    (case.adapter / "adapter_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "trap")))
    assert_refused(tmp_path, case, "adapter_model.bin")


def test_an_adapter_without_weights_is_refused(tmp_path, case):
    (case.adapter / ADAPTER).unlink()
    assert_refused(tmp_path, case, ADAPTER, kind=FileNotFoundError)


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 0},
        {"r": "many"},
        {"spp_alpha": None},
        {"spp_alpha": float("nan")},
        {"alpha_pattern": {"q_proj": "x"}},
        {"alpha_pattern": {"(": 1}},
        {"alpha_pattern": [1]},
        {"rank_pattern": {"q_proj": -1}},
        {"spp_dropout": "none"},
        {"peft_type": "LORA"},
        {"peft_type": None},
        {"trainable_token_indices": [1, 2]},
    ],
    ids=json.dumps,
)
def test_settings_that_cannot_be_used_are_named(tmp_path, case, changes):
    edit_json(case.adapter / CONFIG, **changes)
    assert_refused(tmp_path, case, CONFIG)


def test_settings_without_a_base_model_are_refused(tmp_path, case):
    edit_json(case.adapter / CONFIG, base_model_name_or_path=None)
    with pytest.raises(ValueError, match=CONFIG):
        merge_checkpoint(None, case.adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_an_adapter_is_refused(tmp_path, case):
    (case.adapter / CONFIG).unlink()
    assert_refused(tmp_path, case, CONFIG, kind=FileNotFoundError)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("factor", ["spp_A", "spp_B"])
def test_an_adapter_that_is_not_finite_is_named(tmp_path, case, factor, value):
    name = f"{PREFIX}{Q_PROJ}.{factor}.weight"
    tensor = load_file(case.adapter / ADAPTER)[name]
    tensor.view(-1)[-1] = value
    edit_tensors(case.adapter / ADAPTER, **{name: tensor})
    assert_refused(tmp_path, case, ADAPTER, name)


def test_an_overflow_while_merging_is_an_error_that_names_the_module(tmp_path):
    case = llama_case(tmp_path, dtype=torch.float16)
    name = f"{PREFIX}model.layers.2.mlp.down_proj.spp_B.weight"
    edit_tensors(case.adapter / ADAPTER, **{name: torch.full((32, 1), 1e7)})
    text = assert_refused(tmp_path, case, "model.layers.2.mlp.down_proj", case.adapter)
    assert text.startswith("NaNs detected in the merged weights. The adapter")


@pytest.mark.parametrize("factor", ["spp_A", "spp_B"])
def test_half_an_adapter_is_named(tmp_path, case, factor):
    edit_tensors(case.adapter / ADAPTER, **{f"{PREFIX}{Q_PROJ}.{factor}.weight": None})
    assert_refused(tmp_path, case, Q_PROJ, factor)


@pytest.mark.parametrize(
    "key",
    [
        f"{PREFIX}{Q_PROJ}.lora_A.weight",
        f"{PREFIX}{Q_PROJ}.spp_A.other.weight",
        f"{PREFIX}{Q_PROJ}.spp_C.weight",
        f"{PREFIX}{Q_PROJ}.base_layer.weight",
        f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta",
        "prompt_embeddings",
    ],
)
def test_anything_else_in_an_adapter_is_named(tmp_path, case, key):
    edit_tensors(case.adapter / ADAPTER, **{key: torch.ones(2, 2)})
    text = assert_refused(tmp_path, case, key.removeprefix(PREFIX))
    assert "merge_and_unload" in text


def test_a_factor_that_is_there_twice_is_named(tmp_path, case):
    edit_tensors(case.adapter / ADAPTER, **{f"{Q_PROJ}.spp_A.weight": torch.ones(2, 2)})
    assert "twice" in assert_refused(tmp_path, case, f"{Q_PROJ}.spp_A.weight")


@pytest.mark.parametrize("A, B", [((5, 33), (32, 1)), ((5, 32), (31, 1)), ((5, 32), (32, 2)), ((5,), (32, 1))])
def test_factors_that_do_not_fit_are_named(tmp_path, case, A, B):
    names = {f"{PREFIX}{Q_PROJ}.spp_A.weight": torch.ones(A), f"{PREFIX}{Q_PROJ}.spp_B.weight": torch.ones(B)}
    edit_tensors(case.adapter / ADAPTER, **names)
    assert_refused(tmp_path, case, Q_PROJ)


def test_another_rank_than_the_settings_say_is_named(tmp_path, case):
    edit_json(case.adapter / CONFIG, r=4)
    assert_refused(tmp_path, case, "model.layers", "5", "4")


def test_settings_beside_the_weights_of_other_settings_are_refused(tmp_path, case):
    model = auto("LlamaForCausalLM").from_pretrained(case.base)
    save_adapter(tmp_path / "other", model, SPPConfig(r=5, spp_alpha=64, task_type="CAUSAL_LM"))
    shutil.copy(tmp_path / "other" / ADAPTER, case.adapter / ADAPTER)
    assert_refused(tmp_path, case, case.adapter / ADAPTER)


def test_integer_factors_are_named(tmp_path, case):
    name = f"{PREFIX}{Q_PROJ}.spp_B.weight"
    edit_tensors(case.adapter / ADAPTER, **{name: torch.ones(32, 1, dtype=torch.int8)})
    assert_refused(tmp_path, case, name, "I8")


def test_a_trained_tensor_of_another_dtype_is_named(tmp_path):
    case = llama_case(tmp_path, SPPConfig(r=4, task_type="CAUSAL_LM", modules_to_save=["lm_head"]))
    head = load_file(case.adapter / ADAPTER)[f"{PREFIX}lm_head.weight"]
    edit_tensors(case.adapter / ADAPTER, **{f"{PREFIX}lm_head.weight": head.bfloat16()})
    text = assert_refused(tmp_path, case, "lm_head.weight", "bfloat16", "float32")
    assert "merge_and_unload" in text


def test_a_trained_tensor_of_another_shape_is_named(tmp_path):
    case = llama_case(tmp_path, SPPConfig(r=4, task_type="CAUSAL_LM", modules_to_save=["lm_head"]))
    edit_tensors(case.adapter / ADAPTER, **{f"{PREFIX}lm_head.weight": torch.ones(70, 32)})
    assert_refused(tmp_path, case, "lm_head.weight", "(70, 32)", "(64, 32)")


def test_a_trained_module_that_the_checkpoint_does_not_hold_is_named(tmp_path, case):
    model = auto("LlamaForSequenceClassification").from_pretrained(case.base)
    save_adapter(tmp_path / "adapter", model, SPPConfig(r=5, task_type="SEQ_CLS"))
    assert_refused(tmp_path, case, "score.weight")


def test_an_adapter_of_another_model_altogether_is_refused(tmp_path, case):
    other = save_case(tmp_path / "other", _Saveable(), SPPConfig(r=2, target_modules=["lin0"]), model_class=_Saveable)
    assert_refused(tmp_path, case._replace(adapter=other.adapter), "lin0")


class _Saveable(MLP):
    def save_pretrained(self, folder, **_):
        folder.mkdir(parents=True)
        save_file(self.state_dict(), folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder):
        return cls()
