# SPDX-License-Identifier: Apache-2.0
"""Adapters that somebody else has written: what is wrong with them is named, before the model is changed."""

import json
import os
import pickle
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_spp import SPPConfig
from peft_spp.tuner.config import FORMAT_VERSION
from peft_spp.tuner.settings import Expression, check_patterns

from helpers.tiny import MLP, randomize, tiny, tiny_llama


CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


@pytest.fixture
def adapter(tmp_path):
    return saved(tmp_path / "adapter")


def saved(folder: Path, **settings) -> Path:
    model = get_peft_model(MLP(), SPPConfig(**{"r": 3, "target_modules": ["lin0", "lin1"], **settings}))
    randomize(model)
    model.save_pretrained(folder)
    return folder


def edit(folder: Path, **changes) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / WEIGHTS) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)


def structure(model) -> dict[str, int]:
    return {name: id(module) for name, module in model.named_modules()}


def assert_refused(folder, *named: object, **options) -> None:
    """By `PeftModel.from_pretrained` and `load_adapter`, with an error that names it and the models as they were."""
    base = MLP()
    before = structure(base)
    with pytest.raises(ValueError) as error:
        PeftModel.from_pretrained(base, folder, **options)
    assert type(error.value) is ValueError and structure(base) == before and not hasattr(base, "peft_config")
    for what in named:
        assert str(what) in str(error.value)

    other = get_peft_model(MLP(), SPPConfig(r=2, target_modules=["lin1"]))
    before = structure(other)
    with pytest.raises(ValueError):
        other.load_adapter(folder, "second")
    assert structure(other) == before and list(other.peft_config) == ["default"]


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
    edit(adapter, **changes)
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
    edit(adapter, **changes)
    base = Deep()
    before = structure(base)
    with pytest.raises(ValueError, match=list(changes)[-1]):
        PeftModel.from_pretrained(base, adapter)
    assert structure(base) == before


def test_expressions_of_every_day_are_taken_without_a_trial(monkeypatch):
    monkeypatch.setattr("subprocess.Popen", None)
    for pattern in ("lin0", r"^model\.layers\.0\.mlp$", ".*_proj", r"model\.(q|v)_proj", "(?:a|b)"):
        check_patterns([Expression("target_modules", pattern, whole=True)], ["a.b"])


def test_no_process_is_started_for_settings_that_come_from_no_file(adapter, monkeypatch):
    pattern = r"(\w+\.)*(\w+_)*lin[01]"
    edit(adapter, target_modules=pattern)
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr("subprocess.Popen", lambda *args, **kwargs: started.append(1) or popen(*args, **kwargs))
    get_peft_model(MLP(), SPPConfig(r=3, target_modules=pattern, rank_pattern={r"(\w+\.)*lin1": 2}))
    assert not started
    get_peft_model(MLP(), SPPConfig.from_pretrained(str(adapter)))
    assert started == [1]


def test_a_configuration_from_a_file_is_checked_however_it_is_used(adapter):
    edit(adapter, target_modules="(([a-z0-9._]+)+)+!")
    base = Deep()
    before = structure(base)
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(base, SPPConfig.from_pretrained(str(adapter)))
    assert structure(base) == before


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


FACTOR = "base_model.model.lin0.spp_A.weight"
OTHER_FACTOR = "base_model.model.lin0.spp_B.weight"


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_factors_of_another_dtype_are_named(adapter, dtype):
    edit_weights(adapter, **{FACTOR: torch.ones(3, 12).to(dtype)})
    assert_refused(adapter, WEIGHTS, "lin0.spp_A.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_that_are_not_finite_are_named(adapter, value, dtype):
    tensor = torch.ones(20, 1, dtype=dtype)
    tensor[7] = value
    edit_weights(adapter, **{OTHER_FACTOR: tensor})
    assert_refused(adapter, WEIGHTS, OTHER_FACTOR)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64])
def test_other_tensors_that_are_not_finite_are_named_whatever_their_dtype(adapter, dtype):
    edit_weights(adapter, **{"base_model.model.extra": torch.tensor([1.0, float("nan")]).to(dtype)})
    assert_refused(adapter, WEIGHTS, "base_model.model.extra")


@pytest.mark.parametrize("shape", [(2, 12), (4, 12), (3,), (3, 12, 1), (0, 12)])
def test_factors_of_another_shape_are_named(adapter, shape):
    edit_weights(adapter, **{FACTOR: torch.ones(shape)})
    assert_refused(adapter, WEIGHTS, "lin0")


def test_a_rank_that_the_weights_do_not_have_is_refused_before_memory_is_taken(adapter):
    edit(adapter, r=2**20)
    assert_refused(adapter, WEIGHTS, "lin0", 20, 3)


@pytest.mark.parametrize("key", [FACTOR, OTHER_FACTOR])
def test_half_an_adapter_is_named(adapter, key):
    edit_weights(adapter, **{key: None})
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
    edit_weights(folder, **{f"base_model.model.{missing}": None})
    if form == "pickled":
        pickled(folder)
    file = WEIGHTS if form == "safetensors" else PICKLED
    first = base()
    before = structure(first)
    with pytest.raises(ValueError, match=f"{file}.*lm_head.*{missing.rpartition('.')[2]}"):
        PeftModel.from_pretrained(first, folder)
    assert structure(first) == before and not hasattr(first, "peft_config")
    for own in ({}, {"modules_to_save": ["lm_head"]}):
        other = get_peft_model(base(), SPPConfig(r=2, target_modules=["lin1"], **own))
        before, trainable = structure(other), [p.requires_grad for p in other.parameters()]
        with pytest.raises(ValueError, match="lm_head"):
            other.load_adapter(folder, "second")
        assert structure(other) == before and list(other.peft_config) == ["default"]
        assert [p.requires_grad for p in other.parameters()] == trainable


def test_trained_tokens_that_are_not_in_the_file_are_named(tmp_path):
    config = SPPConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 3], task_type="CAUSAL_LM")
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    PeftModel.from_pretrained(tiny_llama(), tmp_path)
    (name,) = (name for name in load_file(tmp_path / WEIGHTS) if "token_adapter" in name)
    edit_weights(tmp_path, **{name: None})
    base = tiny_llama()
    before = structure(base)
    with pytest.raises(ValueError, match=f"{WEIGHTS}.*token_adapter"):
        PeftModel.from_pretrained(base, tmp_path)
    assert structure(base) == before


def test_a_classification_head_that_is_not_in_the_file_is_named(tmp_path):
    settings = {**tiny_llama().config.to_dict(), "num_labels": 3}
    base = tiny("LlamaForSequenceClassification", **settings)
    get_peft_model(base, SPPConfig(r=2, task_type="SEQ_CLS")).save_pretrained(tmp_path)
    PeftModel.from_pretrained(tiny("LlamaForSequenceClassification", **settings), tmp_path)
    edit_weights(tmp_path, **{"base_model.model.score.weight": None})
    base = tiny("LlamaForSequenceClassification", **settings)
    before = structure(base)
    with pytest.raises(ValueError, match=f"{WEIGHTS}.*score"):
        PeftModel.from_pretrained(base, tmp_path)
    assert structure(base) == before


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


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def pickled(adapter: Path, content: object = None) -> None:
    torch.save(load_file(adapter / WEIGHTS) if content is None else content, adapter / PICKLED)
    (adapter / WEIGHTS).unlink()


def test_pickled_weights_are_refused_unless_nothing_but_weights_is_unpickled(adapter):
    pickled(adapter)
    base = MLP()
    before = structure(base)
    with pytest.raises(ValueError, match=f"{PICKLED}.*weights_only=True"):
        PeftModel.from_pretrained(base, adapter, weights_only=False)
    assert structure(base) == before


def test_pickled_weights_in_a_local_folder_are_loaded_as_peft_does(adapter):
    x = torch.randn(2, 12)
    base = MLP()
    expected = PeftModel.from_pretrained(MLP_like(base), adapter)(x)
    pickled(adapter)
    for flags in ({}, {"weights_only": True}):
        assert torch.equal(PeftModel.from_pretrained(MLP_like(base), adapter, **flags)(x), expected)

    model = get_peft_model(MLP_like(base), SPPConfig(r=2, target_modules=["lin1"]))
    model.load_adapter(adapter, "second")
    model.set_adapter("second")
    assert torch.equal(model(x), expected)


def MLP_like(model: MLP) -> MLP:
    like = MLP()
    like.load_state_dict(model.state_dict())
    return like


@pytest.mark.parametrize("content", ["trap", "list", "values", "nan", "cut", "pickle"])
def test_pickled_weights_with_anything_else_in_them_are_refused_with_the_flag_too(adapter, tmp_path, content):
    tensors = load_file(adapter / WEIGHTS)
    bad = {
        "trap": tensors | {"x": Trap(tmp_path / "trap")},
        "list": [torch.ones(2)],
        "values": {"a": 1},
        "nan": tensors | {FACTOR: torch.full((3, 12), float("nan"))},
    }
    pickled(adapter, bad.get(content))
    if content == "cut":
        (adapter / PICKLED).write_bytes((adapter / PICKLED).read_bytes()[:-100])
    if content == "pickle":
        (adapter / PICKLED).write_bytes(pickle.dumps(Trap(tmp_path / "trap")))
    assert_refused(adapter, PICKLED, weights_only=True)
    assert not (tmp_path / "trap").exists()


def test_settings_beside_the_weights_of_other_settings_are_refused(adapter, tmp_path):
    other = saved(tmp_path / "other", spp_alpha=64)
    (other / WEIGHTS).replace(adapter / WEIGHTS)
    assert_refused(adapter, WEIGHTS, CONFIG)


def test_settings_and_weights_of_two_saves_with_the_same_settings_belong_together(adapter, tmp_path):
    other = saved(tmp_path / "other")
    (other / WEIGHTS).replace(adapter / WEIGHTS)
    PeftModel.from_pretrained(MLP(), adapter)


def test_settings_may_be_edited(adapter):
    edit(adapter, spp_alpha=64)
    assert PeftModel.from_pretrained(MLP(), adapter).peft_config["default"].spp_alpha == 64


@pytest.fixture
def hub(adapter, tmp_path):
    """An adapter as the Hub's cache holds it after a download; it is found without a network."""
    repository = tmp_path / "cache" / "models--me--adapter"
    commit = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    return adapter.rename(repository / "snapshots" / commit), {"cache_dir": str(tmp_path / "cache")}


def test_an_adapter_from_the_hub_loads(hub):
    _, options = hub
    PeftModel.from_pretrained(MLP(), "me/adapter", **options)


@pytest.mark.parametrize("damage", ["cut", "nan", "pickled", "settings"])
def test_an_adapter_from_the_hub_is_checked_before_the_model_is_changed(hub, damage):
    folder, options = hub
    if damage == "cut":
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-4])
    elif damage == "nan":
        edit_weights(folder, **{FACTOR: torch.full((3, 12), float("nan"))})
    elif damage == "pickled":
        pickled(folder)
    else:
        edit(folder, r=4)
    base = MLP()
    before = structure(base)
    with pytest.raises(ValueError, match="adapter_model"):
        PeftModel.from_pretrained(base, "me/adapter", **options)
    assert structure(base) == before


def test_pickled_weights_from_the_hub_are_loaded_with_a_flag(hub):
    folder, options = hub
    x, base = torch.randn(2, 12), MLP()
    expected = PeftModel.from_pretrained(MLP_like(base), "me/adapter", **options)(x)
    pickled(folder)
    model = get_peft_model(MLP_like(base), SPPConfig(r=2, target_modules=["lin1"]))
    with pytest.raises(ValueError, match=PICKLED):
        model.load_adapter("me/adapter", "second", **options)
    assert list(model.peft_config) == ["default"]
    model.load_adapter("me/adapter", "second", weights_only=True, **options)
    model.set_adapter("second")
    assert torch.equal(model(x), expected)


@pytest.fixture
def llama_adapter(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    model = AutoPeftModelForCausalLM._target_class.from_pretrained(tmp_path / "base")
    get_peft_model(model, SPPConfig(r=4, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_auto_classes_check_an_adapter_too(llama_adapter):
    edit(llama_adapter, r=5)
    with pytest.raises(ValueError, match=WEIGHTS):
        AutoPeftModelForCausalLM.from_pretrained(llama_adapter)


def test_transformers_checks_the_settings(llama_adapter):
    for changes in ({"r": 10**12}, {"exclude_modules": "(([a-z0-9._]+)+)+!"}, {"format_version": FORMAT_VERSION + 1}):
        text = (llama_adapter / CONFIG).read_text()
        edit(llama_adapter, **changes)
        model = tiny_llama()
        before = structure(model)
        with pytest.raises(ValueError):
            model.load_adapter(str(llama_adapter))
        assert structure(model) == before
        (llama_adapter / CONFIG).write_text(text)


def test_a_save_replaces_a_link_and_not_what_it_leads_to(adapter, tmp_path):
    (adapter / WEIGHTS).rename(tmp_path / "elsewhere.safetensors")
    (adapter / WEIGHTS).symlink_to(tmp_path / "elsewhere.safetensors")
    before = (tmp_path / "elsewhere.safetensors").read_bytes()
    saved(adapter)
    assert (tmp_path / "elsewhere.safetensors").read_bytes() == before and not (adapter / WEIGHTS).is_symlink()
