# SPDX-License-Identifier: Apache-2.0
"""Weights that somebody else has written: what is wrong with them is named, before the model is changed."""

import json
import struct

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_spp import SPPConfig

from helpers.hostile_adapters import (
    FACTOR,
    OTHER_FACTOR,
    PICKLED,
    WEIGHTS,
    assert_refused,
    pickled,
    saved,
)
from helpers.merge_cases import edit_tensors
from helpers.tiny import MLP, tiny, tiny_llama
from helpers.unchanged import refused


@pytest.fixture
def adapter(tmp_path):
    return saved(tmp_path / "adapter")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_factors_of_another_dtype_are_named(adapter, dtype):
    edit_tensors(adapter / WEIGHTS, **{FACTOR: torch.ones(3, 12).to(dtype)})
    assert_refused(adapter, WEIGHTS, "lin0.spp_A.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_that_are_not_finite_are_named(adapter, value, dtype):
    tensor = torch.ones(20, 1, dtype=dtype)
    tensor[7] = value
    edit_tensors(adapter / WEIGHTS, **{OTHER_FACTOR: tensor})
    assert_refused(adapter, WEIGHTS, OTHER_FACTOR)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64])
def test_other_tensors_that_are_not_finite_are_named_whatever_their_dtype(adapter, dtype):
    edit_tensors(adapter / WEIGHTS, **{"base_model.model.extra": torch.tensor([1.0, float("nan")]).to(dtype)})
    assert_refused(adapter, WEIGHTS, "base_model.model.extra")


@pytest.mark.parametrize("shape", [(2, 12), (4, 12), (3,), (3, 12, 1), (0, 12)])
def test_factors_of_another_shape_are_named(adapter, shape):
    edit_tensors(adapter / WEIGHTS, **{FACTOR: torch.ones(shape)})
    assert_refused(adapter, WEIGHTS, "lin0")


@pytest.mark.parametrize("key", [FACTOR, OTHER_FACTOR])
def test_half_an_adapter_is_named(adapter, key):
    edit_tensors(adapter / WEIGHTS, **{key: None})
    assert_refused(adapter, WEIGHTS, "lin0")


@pytest.mark.parametrize("missing", ["lm_head.weight", "lm_head.bias"])
@pytest.mark.parametrize("form", ["safetensors", "pickled"])
def test_trained_modules_that_are_not_in_the_file_are_named(tmp_path, missing, form):
    def base():
        model = MLP()
        model.lm_head = torch.nn.Linear(6, 4)
        return model

    folder = tmp_path / "adapter"
    settings = {"r": 2, "target_modules": ["lin0"], "modules_to_save": ["lm_head", "not_in_this_model"]}
    get_peft_model(base(), SPPConfig(**settings)).save_pretrained(folder)
    PeftModel.from_pretrained(base(), folder)
    edit_tensors(folder / WEIGHTS, **{f"base_model.model.{missing}": None})
    if form == "pickled":
        pickled(folder)
    file = WEIGHTS if form == "safetensors" else PICKLED
    first = base()
    with refused(first, f"{file}.*lm_head.*{missing.rpartition('.')[2]}"):
        PeftModel.from_pretrained(first, folder)
    for own in ({}, {"modules_to_save": ["lm_head"]}):
        other = get_peft_model(base(), SPPConfig(r=2, target_modules=["lin1"], **own))
        with refused(other, "lm_head"):
            other.load_adapter(folder, "second")


def test_trained_tokens_that_are_not_in_the_file_are_named(tmp_path):
    config = SPPConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 3], task_type="CAUSAL_LM")
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    PeftModel.from_pretrained(tiny_llama(), tmp_path)
    (name,) = (name for name in load_file(tmp_path / WEIGHTS) if "token_adapter" in name)
    edit_tensors(tmp_path / WEIGHTS, **{name: None})
    base = tiny_llama()
    with refused(base, f"{WEIGHTS}.*token_adapter"):
        PeftModel.from_pretrained(base, tmp_path)


def test_a_classification_head_that_is_not_in_the_file_is_named(tmp_path):
    settings = {**tiny_llama().config.to_dict(), "num_labels": 3}
    base = tiny("LlamaForSequenceClassification", **settings)
    get_peft_model(base, SPPConfig(r=2, task_type="SEQ_CLS")).save_pretrained(tmp_path)
    PeftModel.from_pretrained(tiny("LlamaForSequenceClassification", **settings), tmp_path)
    edit_tensors(tmp_path / WEIGHTS, **{"base_model.model.score.weight": None})
    base = tiny("LlamaForSequenceClassification", **settings)
    with refused(base, f"{WEIGHTS}.*score"):
        PeftModel.from_pretrained(base, tmp_path)


def header(**tensors) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + bytes(16)


F32 = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04" * 9,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 10) + b"[" * 10,
        struct.pack("<Q", 50_000) + b"[" * 50_000,
        header(a={**F32, "shape": [2, 3]}),
        header(a={**F32, "shape": [2**32, 2**32]}),
        header(a={**F32, "shape": [-2, -2]}),
        header(a={**F32, "data_offsets": [0, 2**63]}),
        header(a={**F32, "data_offsets": [16, 0]}),
        header(a=F32, b=F32),
        header(a={**F32, "dtype": "F99"}),
        header(a={**F32, "dtype": "F64"}),
    ],
)
def test_a_header_that_lies_is_named(adapter, content):
    (adapter / WEIGHTS).write_bytes(content)
    assert_refused(adapter, WEIGHTS)


def test_a_save_replaces_a_link_and_not_what_it_leads_to(adapter, tmp_path):
    (adapter / WEIGHTS).rename(tmp_path / "elsewhere.safetensors")
    (adapter / WEIGHTS).symlink_to(tmp_path / "elsewhere.safetensors")
    before = (tmp_path / "elsewhere.safetensors").read_bytes()
    saved(adapter)
    assert (tmp_path / "elsewhere.safetensors").read_bytes() == before and not (adapter / WEIGHTS).is_symlink()
