# SPDX-License-Identifier: Apache-2.0
"""Adapters on disk, whole and broken, through each of the ways to load one."""

import json
import re
import subprocess
import sys

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification

from peft_spp import SPPConfig

from helpers.tiny import MLP, randomize, tiny_llama
from helpers.tiny_moe import tiny_moe
from helpers.unchanged import refused


@pytest.fixture
def adapter(tmp_path):
    """A folder with a random adapter of a tiny Llama, and the logits that it gives."""
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, SPPConfig(r=4, task_type="CAUSAL_LM")).eval()
    randomize(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model(input_ids=torch.arange(10).view(1, 10)).logits


def test_every_way_to_load_gives_the_same_logits(adapter):
    folder, expected = adapter
    ids = torch.arange(10).view(1, 10)
    auto = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert torch.equal(auto.eval()(input_ids=ids).logits, expected)

    plain = tiny_llama()
    plain.load_adapter(str(folder))
    assert torch.equal(plain(input_ids=ids).logits, expected)

    injected = inject_adapter_in_model(SPPConfig.from_pretrained(folder), tiny_llama())
    set_peft_model_state_dict(injected, load_file(folder / "adapter_model.safetensors"))
    assert torch.equal(injected.eval()(input_ids=ids).logits, expected)

    both = PeftModel.from_pretrained(tiny_llama(), folder, adapter_name="first").eval()
    both.load_adapter(folder, "second")
    both.set_adapter("second")
    assert torch.equal(both(input_ids=ids).logits, expected)


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("autocast", [True, False])
def test_low_cpu_mem_usage_changes_neither_the_values_nor_the_dtype(autocast, experts, tmp_path):
    def base():
        return tiny_moe("mixtral").bfloat16() if experts else tiny_llama().bfloat16()

    settings = {"target_parameters": ["gate_up_proj", "down_proj"]} if experts else {}
    config = SPPConfig(r=2, task_type="CAUSAL_LM", modules_to_save=["lm_head"], **settings)
    model = get_peft_model(base(), config)
    randomize(model)  # in float32, to which PEFT casts them
    model.save_pretrained(tmp_path)

    def loaded(**arguments):
        arguments["autocast_adapter_dtype"] = autocast
        model = PeftModel.from_pretrained(base(), tmp_path, **arguments)
        model.load_adapter(tmp_path, "second", **arguments)
        return {name: one for name, one in model.named_parameters() if ".spp_" in name or "modules_to_save" in name}

    expected, found = loaded(), loaded(low_cpu_mem_usage=True)
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        assert found[name].dtype == one.dtype, name
        assert torch.equal(found[name], one), name
    assert {one.dtype for name, one in found.items() if ".spp_" in name} == {
        torch.float32 if autocast else torch.bfloat16
    }


def test_values_too_large_for_the_dtype_are_named_with_low_cpu_mem_usage_too(tmp_path):
    model = get_peft_model(tiny_llama(), SPPConfig(r=4, task_type="CAUSAL_LM"))
    randomize(model, 1e6)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        base = tiny_llama().half()
        with refused(base, match=r"tensor '.*spp_A.weight'"):
            PeftModel.from_pretrained(
                base, tmp_path, autocast_adapter_dtype=False, low_cpu_mem_usage=low_cpu_mem_usage
            )


def test_transformers_add_adapter_trains_and_saves(tmp_path):
    model = tiny_llama()
    model.add_adapter(SPPConfig(r=4))
    ids = torch.arange(10).view(1, 10)
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if ".spp_" in n)
    randomize(model)
    model.eval()
    expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    loaded = tiny_llama()
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(loaded(input_ids=ids).logits, expected)
    model.disable_adapters()
    assert torch.equal(model(input_ids=ids).logits, tiny_llama()(input_ids=ids).logits)


def test_a_file_cut_short_is_named_and_the_model_left_alone(adapter):
    folder, _ = adapter
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        base = tiny_llama()
        with refused(base, r"adapter_model\.safetensors"):
            PeftModel.from_pretrained(base, folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_named_and_the_model_left_alone(adapter, value):
    folder, _ = adapter
    tensors = load_file(folder / "adapter_model.safetensors")
    name = sorted(tensors)[3]
    tensors[name].view(-1)[1] = value
    save_file(tensors, folder / "adapter_model.safetensors")
    base = tiny_llama()
    with refused(base, name.replace(".", r"\.")):
        PeftModel.from_pretrained(base, folder)


def test_a_base_of_other_shape_is_named_and_left_alone(adapter):
    folder, _ = adapter
    base = tiny_llama(intermediate_size=64)
    with refused(base, r"(?s)size mismatch.*down_proj\.spp_A.*48.*64", RuntimeError):
        PeftModel.from_pretrained(base, folder)


def test_a_second_adapter_that_does_not_fit_leaves_the_first(adapter, tmp_path):
    folder, expected = adapter
    other = get_peft_model(tiny_llama(intermediate_size=64), SPPConfig(r=4))
    other.save_pretrained(tmp_path / "other")
    model = PeftModel.from_pretrained(tiny_llama(), folder).eval()
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_adapter(tmp_path / "other", "second")
    assert list(model.peft_config) == ["default"]
    assert not any(".second." in name for name, _ in model.named_parameters())
    assert torch.equal(model(input_ids=torch.arange(10).view(1, 10)).logits, expected)


def test_wrong_shapes_in_a_state_dict_change_nothing(adapter):
    folder, expected = adapter
    model = PeftModel.from_pretrained(tiny_llama(), folder).eval()
    tensors = {k: torch.zeros_like(v) for k, v in load_file(folder / "adapter_model.safetensors").items()}
    last = sorted(tensors)[-1]
    tensors[last] = torch.zeros(3, 3)
    with pytest.raises(RuntimeError, match="size mismatch"):
        set_peft_model_state_dict(model, tensors)
    assert torch.equal(model(input_ids=torch.arange(10).view(1, 10)).logits, expected)


def test_modules_to_save_come_back_when_the_adapter_does_not_fit(tmp_path):
    config = SPPConfig(r=3, target_modules=["lin0"], modules_to_save=["lin1"])
    get_peft_model(MLP(n=12), config).save_pretrained(tmp_path)
    base = MLP(n=10)
    with refused(base, "lin0", RuntimeError):
        PeftModel.from_pretrained(base, tmp_path)


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.emb = nn.Embedding(6, 6)
        self.conv = nn.Conv2d(3, 3, 1)


@pytest.mark.parametrize("unsupported", ["emb", "conv"])
def test_an_unsupported_target_is_named_and_the_model_left_alone(unsupported):
    base = Mixture()
    with refused(base, unsupported):
        get_peft_model(base, SPPConfig(r=2, target_modules=["first", unsupported]))


def test_an_integer_weight_is_named_and_the_model_left_alone():
    base = Mixture()
    base.second = nn.Linear(6, 6)
    base.second.weight = nn.Parameter(torch.zeros(6, 6, dtype=torch.int8), requires_grad=False)
    with refused(base, r"second.*int8"):
        get_peft_model(base, SPPConfig(r=2, target_modules=["first", "second"]))


def test_a_failing_second_adapter_leaves_the_first():
    model = get_peft_model(Mixture(), SPPConfig(r=2, target_modules=["first"], init_weights=False))
    expected = model.base_model.model.first(torch.ones(1, 6))
    with pytest.raises(ValueError, match="emb"):
        model.add_adapter("second", SPPConfig(r=2, target_modules=["first", "emb"]))
    assert list(model.peft_config) == ["default"]
    assert model.active_adapters == ["default"]
    assert torch.equal(model.base_model.model.first(torch.ones(1, 6)), expected)
    assert not any(".second." in name for name, _ in model.named_parameters())
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2


def test_no_target_found_is_named_and_the_model_left_alone():
    base = MLP()
    with refused(base, "nope"):
        get_peft_model(base, SPPConfig(r=2, target_modules=["nope"]))
    assert [m for m in base.modules() if isinstance(m, BaseTunerLayer)] == []


def test_adapters_can_be_resharded_names_and_all(tmp_path):
    model = get_peft_model(MLP(), SPPConfig(r=3, target_modules=["lin0"], init_weights=False), adapter_name="mine")
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "mine" / "adapter_model.safetensors")) == {
        "base_model.model.lin0.spp_A.weight",
        "base_model.model.lin0.spp_B.weight",
    }


def test_the_model_card_says_how_to_load(tmp_path):
    for name in ("default", "other"):
        model = get_peft_model(MLP(), SPPConfig(r=3, target_modules=["lin0"]), adapter_name=name)
        model.save_pretrained(tmp_path / name)
        model.save_pretrained(tmp_path / name)
        card = (tmp_path / name / "README.md").read_text()
        assert card.count("import peft_spp") == 1
        assert "- spp" in card
        # the command merges what is in a folder itself, and takes no part of a repository
        assert ("peft-spp merge <this adapter> merged-model" in card) == (name == "default")
        assert "merge_and_unload" in card


def test_a_foreign_readme_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("mine\n")
    SPPConfig(r=3).save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "README.md").read_text() == "mine\n"


@pytest.mark.parametrize("content", [b"---\ntags: [a\n---\ntext", b"---\n- a\n---\n", b"\xff\xfe\xff"])
def test_a_card_that_cannot_be_read_stays_and_does_not_end_a_save(content, tmp_path):
    model = get_peft_model(tiny_llama(), SPPConfig(r=4, task_type="CAUSAL_LM"))
    card = tmp_path / "README.md"
    card.write_bytes(content)
    with pytest.warns(UserWarning, match=r"README\.md stays as it is: its metadata cannot be read"):
        model.save_pretrained(tmp_path)
    assert card.read_bytes() == content
    PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_selected_adapters_are_those_alone_and_a_refusal_leaves_no_folder(tmp_path):
    model = get_peft_model(tiny_llama(), SPPConfig(r=4, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="selected_adapters"):
        model.save_pretrained(tmp_path / "a" / "b", selected_adapters=["zz"])
    assert not (tmp_path / "a").exists()
    model.save_pretrained(tmp_path / "none", selected_adapters=[])
    assert not list((tmp_path / "none").glob("adapter*"))


def test_the_merged_model_needs_no_peft_spp(adapter, tmp_path):
    folder, expected = adapter
    merged = PeftModel.from_pretrained(tiny_llama(), folder).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    code = (
        "import sys, torch, json; from transformers import AutoModelForCausalLM;"
        f"m = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'merged')!r}).eval();"
        "print(json.dumps(m(input_ids=torch.arange(10).view(1, 10)).logits.tolist()));"
        "assert 'peft_spp' not in sys.modules"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    torch.testing.assert_close(torch.tensor(json.loads(out)), expected)


@pytest.mark.parametrize("bias", ["all", "spp_only"])
def test_trained_biases_come_back(bias, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(MLP(), SPPConfig(r=4, target_modules=["lin0"], bias=bias))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "bias" in name}
    assert len(trained) == (2 if bias == "all" else 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 12)
    again = PeftModel.from_pretrained(MLP(), tmp_path)
    named = dict(again.named_parameters())
    for name, parameter in model.named_parameters():
        assert name not in trained or torch.equal(named[name], parameter)
    # what is not trained is the base's own, which is drawn anew here
    again.load_state_dict({name: p for name, p in model.state_dict().items() if name not in trained}, strict=False)
    assert torch.equal(again(x), model.eval()(x))


@pytest.mark.parametrize(("labels", "said"), [(1, ", num_labels=1"), (2, ""), (3, ", num_labels=3")])
@pytest.mark.parametrize("name", ["default", "second"])
def test_the_card_of_a_classifier_loads_as_many_labels_as_it_has(tmp_path, labels, said, name):
    """A reward model has one; Transformers gives a new head two."""
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=labels)
    model = get_peft_model(base, SPPConfig(r=3, task_type="SEQ_CLS"), adapter_name=name)
    model.save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    call = re.search(r"^model = (AutoPeftModelForSequenceClassification\.from_pretrained\(.*\))$", card, re.MULTILINE)
    assert call[1].count("num_labels") == bool(said) and said in call[1]
    if name != "default":
        return  # PEFT looks for a base in a local folder in the adapter's subfolder
    loaded = eval(
        call[1].replace("<this adapter>", str(tmp_path / "saved")),
        {"AutoPeftModelForSequenceClassification": AutoPeftModelForSequenceClassification},
    )
    assert loaded.base_model.model.num_labels == labels
