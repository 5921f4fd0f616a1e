# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts from training to the merged model on disk, with SPP on the fused experts."""

import json
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from peft_spp import SPPConfig
from peft_spp.sparsity import compare_sparsity, sparsity_report

from helpers.tiny import is_positive_zero, randomize
from helpers.tiny_moe import IDS, MOE, PARAMETERS, experts, oriented_experts, tiny_moe


ARCHITECTURES = pytest.mark.parametrize("name", list(MOE))


def spp_config(**settings):
    return SPPConfig(**{"r": 5, "task_type": "CAUSAL_LM", "target_parameters": PARAMETERS, **settings})


def train(model, steps=3):
    model.train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.3)
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@ARCHITECTURES
@pytest.mark.parametrize(
    ("pattern", "dtype"), [("2:4", torch.float32), ("2:8", torch.bfloat16), ("0.5", torch.float32)]
)
def test_masks_of_every_expert_are_kept_from_training_to_disk(name, pattern, dtype, tmp_path):
    tiny_moe(name, pattern=pattern).to(dtype).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    pruned = {key: w == 0 for key, w in experts(base).items()}
    before = base(input_ids=IDS).logits

    model = get_peft_model(base, spp_config())
    train(model)
    trained = model(input_ids=IDS).logits
    assert not torch.allclose(trained, before)
    assert all(torch.equal(w == 0, pruned[key]) for key, w in experts(model).items())
    model.save_pretrained(tmp_path / "adapter")

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(loaded.eval()(input_ids=IDS).logits, trained)
    merged = loaded.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(merged(input_ids=IDS).logits, trained, rtol=1e-2, atol=1e-2)
    for key, w in experts(merged).items():
        assert is_positive_zero(w[pruned[key]]).all() and (w[~pruned[key]] != 0).any()

    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(again(input_ids=IDS).logits, merged(input_ids=IDS).logits)
    # in memory the experts are fused; on disk some architectures store them one by one
    for source, base_source in (
        (again, tiny_moe(name, pattern=pattern).to(dtype)),
        (tmp_path / "merged", tmp_path / "base"),
    ):
        comparison = compare_sparsity(base_source, source)
        assert comparison.kept and comparison.lost == 0 and comparison.negative_zeros == 0
        report = sparsity_report(
            source, patterns=(pattern,) if ":" in pattern else ("2:4",), modules=r".*\.experts\..*"
        )
        assert len(report) in (4, 2 * 4 * 3)
        assert {module.pattern for module in report} == {pattern if ":" in pattern else "unstructured"}


@ARCHITECTURES
def test_the_pattern_is_looked_for_along_the_inputs_of_each_architecture(name):
    model = tiny_moe(name, pattern="2:4")
    report = sparsity_report(model, patterns=("2:4",), modules=r".*\.experts\..*")
    assert {(m.transposed, m.pattern) for m in report} == {(MOE[name][2], "2:4")}
    # the same mask along the outputs is no pattern that hardware knows
    for stack in oriented_experts(model, name).values():
        stack.fill_(1.0)
        stack[:, ::2] = 0.0
        stack[:, 1::4] = 0.0
    assert {m.pattern for m in sparsity_report(model, patterns=("2:4",), modules=r".*\.experts\..*")} == {
        "unstructured"
    }


@ARCHITECTURES
def test_the_adapter_remembers_the_masks_of_all_experts(name, tmp_path):
    model = get_peft_model(tiny_moe(name, pattern="2:4"), spp_config(target_modules=[]))
    model.save_pretrained(tmp_path)
    masks = json.loads((tmp_path / "base_masks.json").read_text())["masks"]
    assert set(masks) == set(experts(model))
    # 4 experts: gate and up have 24 rows each, of 32 inputs
    assert {(key.rpartition(".")[2], *mask["shape"], mask["pattern"]) for key, mask in masks.items()} == {
        ("gate_up_proj", 192, 32, "2:4"),
        ("down_proj", 128, 24, "2:4"),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        same = PeftModel.from_pretrained(tiny_moe(name, pattern="2:4"), tmp_path)
    assert set(same.base_model.relate_base().values()) == {"same"}
    with pytest.raises(ValueError, match=r"experts\.(gate_up|down)_proj: 2:4.*then, 2:4.*now"):
        PeftModel.from_pretrained(tiny_moe(name, seed=1, pattern="2:4"), tmp_path, check_base="error")


def test_a_lost_mask_of_one_expert_is_noticed(tmp_path):
    get_peft_model(tiny_moe("gpt_oss", pattern="2:4"), spp_config(target_modules=[])).save_pretrained(tmp_path)
    base = tiny_moe("gpt_oss", pattern="2:4")
    key, stack = next(iter(oriented_experts(base, "gpt_oss").items()))
    stack[2] = stack[2].flip(-1)
    relations = PeftModel.from_pretrained(base, tmp_path, check_base="off").base_model.relate_base()
    assert {k for k, relation in relations.items() if relation != "same"} == {key}


@ARCHITECTURES
def test_default_targets_and_experts_train_together(name):
    model = get_peft_model(tiny_moe(name), spp_config())
    randomize(model)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    assert any("q_proj" in key for key in gradients) and any("experts" in key for key in gradients)
    assert all(grad is not None and torch.isfinite(grad).all() for grad in gradients.values())
    # a router of its own class is no linear layer
    assert not any(".gate." in key or ".router." in key for key in gradients)


@ARCHITECTURES
def test_generation_with_the_adapter_is_that_of_the_merged_model(name):
    model = get_peft_model(tiny_moe(name), spp_config()).eval()
    randomize(model)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(input_ids=IDS, **settings)
    assert torch.equal(model.merge_and_unload().generate(input_ids=IDS, **settings), generated)
