# SPDX-License-Identifier: Apache-2.0
"""`ensure_weight_tying`: what a model ties stays tied where it is trained and saved in full, as with LoRA."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from peft_spp import SPPConfig
from peft_spp.merge import merge_checkpoint

from helpers.merge_cases import Case, assert_same_bits, edit_tensors, merged_by_peft, save_adapter, stored
from helpers.tiny import tiny, tiny_llama


IDS = torch.arange(10)[None]
NAMES = [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"], ["model.embed_tokens"]]


def tied(model: torch.nn.Module) -> bool:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    parts = [getattr(one, "modules_to_save", {"default": one})["default"] for one in (embedding, head)]
    return parts[0].weight is parts[1].weight


def adapt(model: torch.nn.Module, config_class: type = SPPConfig, **settings: object) -> PeftModel:
    return get_peft_model(model, config_class(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **settings))


@pytest.mark.parametrize("names", NAMES, ids="+".join)
def test_the_same_is_tied_trained_and_saved_as_with_lora(tmp_path: Path, names: list[str]) -> None:
    models = {}
    for config_class in (SPPConfig, LoraConfig):
        model = adapt(
            tiny_llama(tie_word_embeddings=True), config_class, modules_to_save=names, ensure_weight_tying=True
        )
        assert tied(model.base_model.model)
        model.save_pretrained(tmp_path / config_class.__name__)
        models[config_class] = model
    spp, lora = (models[one] for one in (SPPConfig, LoraConfig))
    whole = [
        {name for name, one in model.named_parameters() if one.requires_grad and "modules_to_save" in name}
        for model in (spp, lora)
    ]
    assert whole[0] == whole[1] and len(whole[0]) == 1
    saved = [
        {name for name in load_file(tmp_path / one / "adapter_model.safetensors") if "_proj" not in name}
        for one in ("SPPConfig", "LoraConfig")
    ]
    # under both names, as PEFT does
    prefix = "base_model.model."
    assert saved[0] == saved[1] == {f"{prefix}lm_head.weight", f"{prefix}model.embed_tokens.weight"}


def test_it_comes_back_tied_and_is_merged_tied(tmp_path: Path) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    model = adapt(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), modules_to_save=["lm_head"], ensure_weight_tying=True
    )
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=10.0)
    before = model(input_ids=IDS).logits
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    expected = model(input_ids=IDS).logits
    assert not torch.allclose(expected, before)
    model.save_pretrained(tmp_path / "adapter")

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert tied(loaded.base_model.model)
    assert torch.equal(loaded(input_ids=IDS).logits, expected)
    assert torch.equal(loaded.merge_and_unload()(input_ids=IDS).logits, expected)


def test_a_merge_from_disk_to_disk_replaces_the_tensor_that_both_share(tmp_path: Path) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    case = Case(tmp_path / "base", tmp_path / "adapter", AutoModelForCausalLM)
    config = SPPConfig(r=4, task_type="CAUSAL_LM", modules_to_save=["lm_head"], ensure_weight_tying=True)
    save_adapter(case.adapter, AutoModelForCausalLM.from_pretrained(case.base), config)
    report = merge_checkpoint(case.base, case.adapter, tmp_path / "out")
    assert report.replaced == ("model.embed_tokens.weight",)
    assert_same_bits(stored(tmp_path / "out"), stored(merged_by_peft(case, tmp_path / "peft")))

    # where the checkpoint has a second copy, it is replaced, too
    weight = stored(case.base)["model.embed_tokens.weight"]
    edit_tensors(case.base / "model.safetensors", **{"lm_head.weight": weight.clone()})
    merge_checkpoint(case.base, case.adapter, tmp_path / "again")
    merged = stored(tmp_path / "again")
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    assert_same_bits({name: one for name, one in merged.items() if name != "lm_head.weight"}, stored(tmp_path / "out"))

    # and copies that differ were not one in training
    edit_tensors(case.adapter / "adapter_model.safetensors", **{"base_model.model.lm_head.weight": weight + 1})
    with pytest.raises(ValueError, match="tied to another module"):
        merge_checkpoint(case.base, case.adapter, tmp_path / "differ")


@pytest.mark.parametrize(
    ("settings", "tie", "message"),
    [
        ({"ensure_weight_tying": True, "modules_to_save": ["lm_head"]}, False, "no tied modules were found"),
        ({"ensure_weight_tying": True}, True, "no tied modules are added"),
        ({"modules_to_save": ["lm_head"]}, True, "`ensure_weight_tying` is not set to True"),
    ],
)
def test_the_warnings_are_those_of_lora(settings: dict[str, object], tie: bool, message: str) -> None:
    for config_class in (SPPConfig, LoraConfig):
        with pytest.warns(UserWarning, match=message):
            adapt(tiny_llama(tie_word_embeddings=tie), config_class, **settings)


def test_adapters_of_tied_targets_are_not_tied_and_a_warning_says_so() -> None:
    config = SPPConfig(r=4, target_modules=["q_proj", "lm_head"], ensure_weight_tying=True)
    with pytest.warns(UserWarning, match="no implementation exists to tie the adapters"):
        get_peft_model(tiny_llama(tie_word_embeddings=True), config)


@pytest.mark.parametrize("tie", [True, False])
def test_trained_tokens_stay_tied(tie: bool) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = adapt(tiny_llama(tie_word_embeddings=tie), trainable_token_indices=[1, 2], ensure_weight_tying=True)
    with torch.no_grad():
        for name, one in model.named_parameters():
            if "trainable_tokens_delta" in name:
                one.fill_(3.0)
    head = model.base_model.model.lm_head
    weight = head.token_adapter.get_merged_weights(["default"]) if tie else head.weight
    assert bool((weight[1:3] == 3).all()) is tie
    assert any("does not have tied weights" in str(one.message) for one in seen) is not tie


def test_other_values_are_refused() -> None:
    with pytest.raises(ValueError, match="ensure_weight_tying"):
        SPPConfig(ensure_weight_tying="yes")


def tiny_gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config).eval()


def test_what_peft_did_not_tie_is_not_merged_from_disk_as_if_it_were(tmp_path: Path) -> None:
    # of a GPT-2's embedding PEFT says that nothing is tied to it, and only the embedding is trained
    tiny_gpt2().save_pretrained(tmp_path / "base")
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    config = SPPConfig(r=2, target_modules=["c_attn"], modules_to_save=["wte"], ensure_weight_tying=True)
    model = get_peft_model(base, config)
    with torch.no_grad():
        base.transformer.wte.modules_to_save["default"].weight.mul_(2)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"'transformer.wte.weight', whose weight is tied.*merge_and_unload"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_second_adapter_is_not_trained_untied(tmp_path: Path) -> None:
    settings = {"r": 4, "modules_to_save": ["lm_head"], "ensure_weight_tying": True}
    model = adapt(tiny_llama(tie_word_embeddings=True), modules_to_save=["lm_head"], ensure_weight_tying=True)
    with pytest.raises(ValueError, match="would be trained untied"):
        model.add_adapter("second", SPPConfig(**settings))
    assert [*model.peft_config] == ["default"] and tied(model.base_model.model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="would be trained untied"):
        model.load_adapter(tmp_path, "again")
    # where nothing is tied there is nothing to untie
    model = adapt(tiny_llama(tie_word_embeddings=False), modules_to_save=["lm_head"])
    model.add_adapter("second", SPPConfig(**settings))


@pytest.mark.parametrize("names", [["lm_head"], ["shared"], ["embed_tokens"]], ids="+".join)
@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "BartForConditionalGeneration"])
def test_several_tied_embeddings_are_refused_before_anything_is_changed(name: str, names: list[str]) -> None:
    """PEFT puts a linear layer in the place of an embedding, and the forward pass fails."""
    sizes = {
        "T5ForConditionalGeneration": {"d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4},
        "BartForConditionalGeneration": {
            f"{part}_{size}": value
            for part in ("encoder", "decoder")
            for size, value in {"layers": 1, "attention_heads": 2, "ffn_dim": 48}.items()
        },
    }
    settings = {"target_modules": r".*\.(q|q_proj)", "task_type": "SEQ_2_SEQ_LM"}
    model = tiny(name, vocab_size=64, d_model=32, decoder_start_token_id=0, tie_word_embeddings=True, **sizes[name])
    before = [(name, id(one)) for name, one in model.named_modules()]
    with pytest.raises(ValueError, match=r"decoder\.embed_tokens.*shared.*tied.*out of `modules_to_save`"):
        get_peft_model(model, SPPConfig(**settings, modules_to_save=names, ensure_weight_tying=True))
    assert [(name, id(one)) for name, one in model.named_modules()] == before
    adapted = get_peft_model(model, SPPConfig(**settings, ensure_weight_tying=True))
    adapted(input_ids=IDS, labels=IDS).loss.backward()
