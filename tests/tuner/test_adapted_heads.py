# SPDX-License-Identifier: Apache-2.0
"""An adapted head: PEFT saves the weight of its base layer next to the factors, and it must not change the model."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_spp import SPPConfig, hotswap_adapter
from peft_spp.merge import merge_checkpoint

from helpers.tiny import is_positive_zero, prune_, randomize, tiny_llama


IDS = torch.tensor([[1, 5, 9]])
HEAD = "base_model.model.lm_head.base_layer.weight"


def adapted(base):
    model = get_peft_model(base, SPPConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))
    randomize(model)
    return model.eval()


@pytest.fixture
def base(tmp_path):
    """The folder of a model with a pruned head."""
    model = tiny_llama()
    for name, weight in model.named_parameters():
        if "q_proj" in name or "lm_head" in name:
            prune_(weight, "0.5")
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(base):
    return AutoModelForCausalLM.from_pretrained(base).eval()


def test_a_head_that_was_pruned_further_keeps_its_zeros(base, tmp_path):
    adapted(load(base)).save_pretrained(tmp_path / "adapter")
    assert HEAD in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    further = load(base)
    prune_(further.lm_head.weight, "0.5")
    before = further.lm_head.weight.clone()
    loaded = PeftModel.from_pretrained(further, tmp_path / "adapter", check_base="error")
    assert torch.equal(loaded.base_model.model.lm_head.base_layer.weight, before)
    merged = loaded.merge_and_unload()
    assert bool(is_positive_zero(merged.lm_head.weight)[before == 0].all())


@pytest.mark.parametrize("check_base", ["error", "warn"])
def test_a_head_with_other_values_whose_zeros_would_be_lost_is_told(base, tmp_path, check_base):
    adapted(load(base)).save_pretrained(tmp_path / "adapter")
    other = load(base)
    with torch.no_grad():
        other.lm_head.weight[3] *= 2
        other.lm_head.weight[3, other.lm_head.weight[3].nonzero()[0]] = 0.0
    message = "a weight of 'lm_head' with it, .*1 of its zeros"
    if check_base == "error":
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(other, tmp_path / "adapter", check_base="error")
    else:
        with pytest.warns(UserWarning, match=message):
            PeftModel.from_pretrained(other, tmp_path / "adapter")


def test_rows_of_new_tokens_are_loaded(base, tmp_path):
    model = load(base)
    model.resize_token_embeddings(model.config.vocab_size + 3)
    model = adapted(model)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    again = load(base)
    torch.manual_seed(1)
    again.resize_token_embeddings(again.config.vocab_size + 3)
    assert not torch.equal(again.lm_head.weight, model.base_model.model.lm_head.base_layer.weight)
    loaded = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    assert torch.equal(loaded(IDS).logits, expected)


def test_an_adapter_that_is_saved_while_merged_is_applied_once(base, tmp_path):
    model = adapted(load(base))
    expected = model(IDS).logits
    model.save_pretrained(tmp_path / "before")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "adapter")
    saved, before = (load_file(tmp_path / one / "adapter_model.safetensors") for one in ("adapter", "before"))
    assert saved.keys() == before.keys() and all(torch.equal(saved[name], before[name]) for name in saved)
    assert torch.equal(PeftModel.from_pretrained(load(base), tmp_path / "adapter").eval()(IDS).logits, expected)


def test_it_is_merged_from_disk_and_into_its_own_base_only(base, tmp_path):
    model = adapted(load(base))
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")
    expected = model.merge_and_unload().state_dict()
    assert all(torch.equal(one, expected[name]) for name, one in load(tmp_path / "merged").state_dict().items())
    other = load(base)
    with torch.no_grad():
        other.lm_head.weight[0] *= 2
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"a weight of its own, '.*lm_head\.base_layer\.weight'.*merge_and_unload"):
        merge_checkpoint(tmp_path / "other", tmp_path / "adapter", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_it_is_hotswapped(base, tmp_path):
    new = adapted(load(base))
    new.save_pretrained(tmp_path / "adapter")
    model = get_peft_model(load(base), SPPConfig(r=4, target_modules=["q_proj", "lm_head"])).eval()
    hotswap_adapter(model, tmp_path / "adapter", "default")
    assert torch.equal(model(IDS).logits, new(IDS).logits)
