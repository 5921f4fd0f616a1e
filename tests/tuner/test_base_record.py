# SPDX-License-Identifier: Apache-2.0
"""The masks that an adapter was trained on are recorded, and compared with those of the base it is loaded onto."""

import copy
import json
import warnings
from contextlib import contextmanager

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file

from peft_spp import SPPConfig, hotswap_adapter
from peft_spp.sparsity import MaskRecord, record_mask
from peft_spp.sparsity.base_masks import BaseRecord, relate_checkpoint
from peft_spp.tuner.config import FORMAT_VERSION
from peft_spp.tuner.saved_adapter import read_adapter

from helpers.tiny import masked_llama, randomize, tiny, tiny_llama
from helpers.unchanged import refused


def save_adapter(tmp_path, base, **settings):
    model = get_peft_model(base, SPPConfig(r=4, task_type="CAUSAL_LM", **settings))
    randomize(model)
    model.save_pretrained(tmp_path)
    return model


@contextmanager
def no_warning_of_the_base():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*with different masks")
        yield


def saved_config(tmp_path):
    return json.loads((tmp_path / "adapter_config.json").read_text())


def saved_masks(tmp_path):
    return json.loads((tmp_path / "base_masks.json").read_text())


def test_an_adapter_records_the_masks_it_was_trained_on(tmp_path):
    base = masked_llama()
    expected = {
        name.removesuffix(".weight"): record_mask(weight).to_dict()
        for name, weight in base.named_parameters()
        if "layers" in name and weight.dim() == 2
    }
    save_adapter(tmp_path, base)
    assert saved_masks(tmp_path) == {
        "weights_id": saved_config(tmp_path)["weights_id"],
        "quantization": None,
        "masks": expected,
    }
    assert saved_config(tmp_path)["format_version"] == FORMAT_VERSION


def test_the_same_base_loads_silently(tmp_path):
    save_adapter(tmp_path, masked_llama())
    with no_warning_of_the_base():
        model = PeftModel.from_pretrained(masked_llama(), tmp_path)
    assert set(model.base_model.relate_base().values()) == {"same"}


def test_a_base_with_more_zeros_loads_silently(tmp_path):
    save_adapter(tmp_path, masked_llama())
    base = masked_llama()
    for name, weight in base.named_parameters():
        if "q_proj" in name:
            weight.data[0] = 0.0
    with no_warning_of_the_base():
        model = PeftModel.from_pretrained(base, tmp_path)
    relations = model.base_model.relate_base()
    assert {relation for name, relation in relations.items() if "q_proj" in name} == {"refined"}
    assert {relation for name, relation in relations.items() if "q_proj" not in name} == {"same"}


@pytest.mark.parametrize("base", [lambda: masked_llama(seed=1), tiny_llama])
def test_another_mask_or_a_dense_base_warns_and_names_modules(tmp_path, base):
    save_adapter(tmp_path, masked_llama())
    with pytest.warns(UserWarning, match=r"model\.layers\.0\.self_attn\.q_proj"):
        model = PeftModel.from_pretrained(base(), tmp_path)
    assert set(model.base_model.relate_base().values()) == {"different"}


def test_error_leaves_the_model_as_it_was(tmp_path):
    save_adapter(tmp_path, masked_llama())
    base = tiny_llama()
    config = SPPConfig.from_pretrained(tmp_path)
    config.check_base = "error"
    with refused(base, r"layers\.0\.self_attn\.q_proj"):
        PeftModel.from_pretrained(base, tmp_path, config=config)


def test_error_for_a_second_adapter_leaves_the_first(tmp_path):
    save_adapter(tmp_path, masked_llama())
    model = get_peft_model(tiny_llama(), SPPConfig(r=4, task_type="CAUSAL_LM"))
    with refused(model, "'second'"):
        model.load_adapter(tmp_path, "second", check_base="error")


def test_check_base_can_be_given_where_the_adapter_is_loaded(tmp_path):
    save_adapter(tmp_path, masked_llama())
    with pytest.raises(ValueError, match="check_base"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path, check_base="error")
    with no_warning_of_the_base():
        PeftModel.from_pretrained(tiny_llama(), tmp_path, check_base="off")


def test_check_base_is_checked():
    with pytest.raises(ValueError, match="check_base"):
        SPPConfig(check_base="maybe")


def test_a_record_survives_saving_again_onto_another_base(tmp_path):
    save_adapter(tmp_path / "first", masked_llama())
    before = saved_masks(tmp_path / "first")
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "first", check_base="off")
    model.save_pretrained(tmp_path / "second")
    assert saved_masks(tmp_path / "second")["masks"] == before["masks"] != {}


def test_a_configuration_used_twice_describes_each_base(tmp_path):
    config = SPPConfig(r=4, task_type="CAUSAL_LM")
    get_peft_model(masked_llama(), config)
    with no_warning_of_the_base():
        get_peft_model(masked_llama(seed=1), config).save_pretrained(tmp_path)
        copied = copy.deepcopy(config)
        get_peft_model(masked_llama(seed=2), copied)
    with no_warning_of_the_base():
        PeftModel.from_pretrained(masked_llama(seed=1), tmp_path)


def test_models_that_share_a_configuration_have_records_of_their_own_bases(tmp_path):
    config = SPPConfig(r=4, task_type="CAUSAL_LM")
    models = [get_peft_model(masked_llama(seed=seed), config) for seed in (0, 1)]
    bare = masked_llama(seed=2)
    bare.add_adapter(config)
    for number, model in enumerate((*models, bare)):
        randomize(model)
        model.save_pretrained(tmp_path / str(number))
    for number in range(3):
        PeftModel.from_pretrained(masked_llama(seed=number), tmp_path / str(number), check_base="error")
        with pytest.raises(ValueError, match="different masks"):
            PeftModel.from_pretrained(masked_llama(seed=number + 1), tmp_path / str(number), check_base="error")


def test_a_loaded_configuration_of_a_new_adapter_has_the_record_of_the_new_base(tmp_path):
    save_adapter(tmp_path / "old", masked_llama())
    config = SPPConfig.from_pretrained(tmp_path / "old", check_base="error")
    config.inference_mode = False
    with no_warning_of_the_base():
        get_peft_model(masked_llama(seed=1), config).save_pretrained(tmp_path / "new")
        PeftModel.from_pretrained(masked_llama(seed=1), tmp_path / "new", check_base="error")
    with pytest.raises(ValueError, match="different masks"):
        PeftModel.from_pretrained(masked_llama(), tmp_path / "new", check_base="error")
    # and the configuration still describes the saved adapter
    PeftModel.from_pretrained(masked_llama(), tmp_path / "old", config=config)
    config.save_pretrained(tmp_path / "copied")
    assert saved_masks(tmp_path / "copied")["masks"] == saved_masks(tmp_path / "old")["masks"]


def test_weights_that_are_loaded_by_hand_bring_the_record_of_their_configuration(tmp_path):
    save_adapter(tmp_path, masked_llama())
    model = inject_adapter_in_model(SPPConfig.from_pretrained(tmp_path), masked_llama(seed=1))
    state_dict = load_file(tmp_path / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match="with different masks"):
        set_peft_model_state_dict(model, state_dict)
    assert model.peft_config["default"].base_record.to_dict()["masks"] == saved_masks(tmp_path)["masks"]


def test_loading_over_an_adapter_checks_the_base_and_takes_the_record(tmp_path):
    save_adapter(tmp_path, masked_llama())
    model = get_peft_model(masked_llama(seed=1), SPPConfig(r=4, task_type="CAUSAL_LM"))
    own = model.peft_config["default"].base_record
    with pytest.raises(ValueError, match="different masks"):
        model.load_adapter(tmp_path, "default", check_base="error")
    assert model.peft_config["default"].base_record == own
    model.load_adapter(tmp_path, "default", check_base="off")
    assert model.peft_config["default"].base_record.to_dict()["masks"] == saved_masks(tmp_path)["masks"]


@pytest.mark.parametrize("body", [False, True])
def test_the_record_is_compared_with_a_checkpoint_on_disk(tmp_path, body):
    base = masked_llama()
    save_adapter(tmp_path / "adapter", masked_llama())
    record = read_adapter(tmp_path / "adapter").base
    (base.model if body else base).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert relate_checkpoint(record, tmp_path / "base") == dict.fromkeys(record.masks, "same")
    base.model.layers[1].mlp.up_proj.weight.data[3] = 0.0
    base.model.layers[2].self_attn.q_proj.weight.data.add_(1.0)
    base.save_pretrained(tmp_path / "other")
    relations = relate_checkpoint(record, tmp_path / "other")
    expected = {"model.layers.1.mlp.up_proj": "refined", "model.layers.2.self_attn.q_proj": "different"}
    assert {name: relation for name, relation in relations.items() if relation != "same"} == expected
    live = PeftModel.from_pretrained(base, tmp_path / "adapter", check_base="off").base_model.relate_base()
    assert relations == live


def test_the_record_of_transposed_weights_is_compared_with_a_checkpoint_on_disk(tmp_path):
    base = tiny("GPT2LMHeadModel", n_embd=32, n_layer=2, n_head=4, vocab_size=64)
    for name, weight in base.named_parameters():
        if ".h." in name and weight.dim() == 2:
            weight.data[torch.rand(weight.shape) < 0.5] = 0.0
    base.save_pretrained(tmp_path / "base")
    get_peft_model(base, SPPConfig(r=4, fan_in_fan_out=True)).save_pretrained(tmp_path / "adapter")
    record = read_adapter(tmp_path / "adapter").base
    assert relate_checkpoint(record, tmp_path / "base") == dict.fromkeys(record.masks, "same")
    assert len(record.masks) == 8


def test_a_second_adapter_is_recorded_while_the_first_is_merged(tmp_path):
    model = get_peft_model(masked_llama(), SPPConfig(r=4, task_type="CAUSAL_LM", init_weights=False))
    for module in model.modules():
        if hasattr(module, "spp_A"):  # a factor that makes every weight of the first row zero
            module.spp_A["default"].weight.data.fill_(1.0)
            module.spp_B["default"].weight.data.zero_()
            module.spp_B["default"].weight.data[0] = -1.0 / module.scaling["default"]
    model.merge_adapter()
    model.add_adapter("second", SPPConfig(r=4, task_type="CAUSAL_LM"))
    first, second = (model.peft_config[name].base_record for name in ("default", "second"))
    assert first == second


def test_after_a_merge_the_record_shows_that_nothing_was_lost(tmp_path):
    model = save_adapter(tmp_path, masked_llama(dtype=torch.bfloat16))
    merged = model.merge_and_unload()
    for name, data in saved_masks(tmp_path)["masks"].items():
        weight = merged.get_parameter(f"{name}.weight")
        assert MaskRecord.from_dict(data).relation_of(record_mask(weight)) in ("same", "refined")


def test_a_base_on_the_meta_device_is_not_recorded():
    with torch.device("meta"):
        model = tiny_llama()
    model = get_peft_model(model, SPPConfig(r=4, task_type="CAUSAL_LM"))
    assert model.peft_config["default"].base_record == BaseRecord()


def test_a_newer_format_is_refused(tmp_path):
    save_adapter(tmp_path, masked_llama())
    config = saved_config(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "format_version": FORMAT_VERSION + 1}))
    with pytest.raises(ValueError, match=str(FORMAT_VERSION + 1)):
        PeftModel.from_pretrained(masked_llama(), tmp_path)


@pytest.mark.parametrize(
    "record",
    [{"masks": 3}, {"quantization": 1, "masks": {}}, {"masks": {"model.layers.0.self_attn.q_proj": {"zeros": 1}}}],
)
def test_a_broken_record_is_refused_and_the_model_left_alone(tmp_path, record):
    save_adapter(tmp_path, masked_llama())
    (tmp_path / "base_masks.json").write_text(json.dumps(record))
    base = masked_llama()
    with refused(base, r"base_masks\.json"):
        PeftModel.from_pretrained(base, tmp_path)


def test_an_adapter_without_a_record_loads(tmp_path):
    save_adapter(tmp_path, masked_llama())
    (tmp_path / "base_masks.json").unlink()
    with no_warning_of_the_base():
        model = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert model.peft_config["default"].base_record is None
    with pytest.warns(UserWarning, match="no record of its base model"):
        assert model.base_model.relate_base() == {}


def test_error_refuses_an_adapter_without_a_record_at_every_entrance(tmp_path):
    save_adapter(tmp_path, masked_llama())
    (tmp_path / "base_masks.json").unlink()
    model = PeftModel.from_pretrained(masked_llama(), tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = SPPConfig.from_pretrained(tmp_path, check_base="error")
    base = masked_llama()
    for load in (
        lambda: PeftModel.from_pretrained(base, tmp_path, check_base="error"),
        lambda: PeftModel.from_pretrained(base, tmp_path, config=config),
        lambda: model.load_adapter(tmp_path, "second", check_base="error"),
        lambda: model.load_adapter(tmp_path, "default", check_base="error"),
        lambda: hotswap_adapter(model, tmp_path, "default", check_base="error"),
    ):
        with pytest.raises(ValueError, match=r"no record of its base model.*base_masks\.json"):
            load()
        assert model.peft_config["default"].check_base == "warn"
    assert base.state_dict().keys() == masked_llama().state_dict().keys()
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
