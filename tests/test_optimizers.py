# SPDX-License-Identifier: Apache-2.0
"""Groups of parameters, and PEFT's helpers that know LoRA alone: what docs/training.md says of them."""

from __future__ import annotations

import warnings

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, lorafa
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from transformers import Trainer, TrainingArguments

from peft_spp import SPPConfig, SPPLayer, spp_parameter_groups
from peft_spp.optimizers import warn_in_optimizers

from helpers.tiny import randomize, tiny_llama
from helpers.tiny_moe import tiny_moe


def adapted(base: nn.Module | None = None, **settings: object) -> nn.Module:
    return get_peft_model(tiny_llama() if base is None else base, SPPConfig(r=4, **settings))  # type: ignore[arg-type]


def names_of(model: nn.Module, group: dict[str, object]) -> set[str]:
    members = {id(parameter) for parameter in group["params"]}  # type: ignore[attr-defined]
    return {name for name, parameter in model.named_parameters() if id(parameter) in members}


def test_every_trained_parameter_is_in_one_group_and_b_has_its_own_rate() -> None:
    model = adapted(bias="spp_only", modules_to_save=["lm_head"])
    a, b = spp_parameter_groups(model, 0.5, B_lr_ratio=4.0, weight_decay=0.1)
    assert (a["lr"], b["lr"], a["weight_decay"], b["weight_decay"]) == (0.5, 2.0, 0.1, 0.1)
    in_b = {name for name, one in model.named_parameters() if one.requires_grad and ".spp_B." in name}
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    assert names_of(model, b) == in_b and in_b
    assert names_of(model, a) == trained - in_b and any("lm_head" in name for name in names_of(model, a))
    assert len(a["params"]) + len(b["params"]) == len(trained)


def test_biases_do_not_decay_and_frozen_adapters_are_left_out() -> None:
    model = adapted(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), target_modules=["0", "1"], bias="all")
    model.add_adapter("frozen", SPPConfig(r=2, target_modules=["0", "1"]))
    groups = spp_parameter_groups(model, 0.5, weight_decay=0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]
    assert all("bias" in name for name in names_of(model, groups[2])) and len(groups[2]["params"]) == 2
    assert not any("frozen" in name for group in groups for name in names_of(model, group))


def test_stacks_of_experts_are_grouped_too() -> None:
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    model = adapted(tiny_moe("mixtral"), target_parameters=experts)
    _, b = spp_parameter_groups(model, 0.5, B_lr_ratio=2.0)
    assert any("experts" in name for name in names_of(model, b))
    assert all(".spp_B." in name for name in names_of(model, b))


def test_a_step_goes_by_the_rates() -> None:
    model = adapted()
    randomize(model)
    before = {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}
    tokens = torch.arange(8)[None]
    optimizer = torch.optim.SGD(spp_parameter_groups(model, 0.5, B_lr_ratio=4.0))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = 2.0 if ".spp_B." in name else 0.5
            torch.testing.assert_close(parameter.detach(), before[name] - rate * parameter.grad)


def test_the_trainer_keeps_the_groups(tmp_path) -> None:
    model = adapted()
    optimizer = torch.optim.AdamW(spp_parameter_groups(model, 1e-2, B_lr_ratio=4.0))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to="none", lr_scheduler_type="constant", save_strategy="no"
    )
    data = Dataset.from_list([{"input_ids": list(range(8)), "labels": list(range(8))}] * 4)
    trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
    trainer.train()
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [1e-2, 4e-2]


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan"), float("inf")])
def test_a_ratio_that_is_none_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="B_lr_ratio"):
        spp_parameter_groups(adapted(), 0.5, B_lr_ratio=ratio)


def test_a_model_without_trained_factors_is_refused() -> None:
    with pytest.raises(ValueError, match="no SPP factors that are trained"):
        spp_parameter_groups(tiny_llama(), 0.5)
    with pytest.raises(ValueError, match="no SPP factors that are trained"):
        spp_parameter_groups(adapted(inference_mode=True), 0.5)


def test_peft_s_own_groups_have_nothing_of_spp_in_b() -> None:
    """When this fails, docs/training.md may send readers to PEFT's function."""
    model = adapted()
    with pytest.warns(UserWarning, match=r"no effect on SPP.*spp_parameter_groups") as seen:
        groups = create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.5, loraplus_lr_ratio=4.0).param_groups
    assert {group["lr"] for group in groups if group["params"]} == {0.5}
    assert [one.filename for one in seen] == [__file__]


def test_peft_s_own_groups_are_silent_about_lora() -> None:
    warn_in_optimizers()  # again
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups = create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.5, loraplus_lr_ratio=4.0).param_groups
    assert {group["lr"] for group in groups if group["params"]} == {0.5, 2.0}


def test_lora_fa_says_that_it_is_adamw_for_spp() -> None:
    """When this fails, docs/training.md may send readers to PEFT's function."""
    model = adapted()
    with pytest.warns(UserWarning, match=r"does not freeze A of SPP.*Use `torch\.optim\.AdamW`") as seen:
        create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=0.5)
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if ".spp_A." in name)
    assert [one.filename for one in seen] == [__file__]


def test_lora_fa_is_silent_about_lora_and_takes_parameters_alone() -> None:
    warn_in_optimizers()  # again
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    parameters = list(adapted().parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=0.5), lorafa.LoraFAOptimizer)
        optimizer = lorafa.LoraFAOptimizer(iter(parameters))
    assert len(optimizer.param_groups[0]["params"]) == len(parameters)


def test_peft_s_rescaling_is_refused_and_layers_have_their_own() -> None:
    model = adapted()
    randomize(model)
    tokens = torch.arange(8)[None]
    expected = model(input_ids=tokens).logits
    with pytest.raises(ValueError, match="LoraLayer"), rescale_adapter_scale(model, 0.5):
        pass
    layers = [layer for layer in model.modules() if isinstance(layer, SPPLayer)]
    for layer in layers:
        layer.scale_layer(0.5)
    assert not torch.equal(model(input_ids=tokens).logits, expected)
    for layer in layers:
        layer.unscale_layer()
    assert torch.equal(model(input_ids=tokens).logits, expected)


def test_tied_embeddings() -> None:
    with pytest.warns(UserWarning, match="`ensure_weight_tying` is not set to True"):
        model = adapted(tiny_llama(tie_word_embeddings=True), modules_to_save=["embed_tokens"]).base_model.model
    assert isinstance(model.model.embed_tokens, ModulesToSaveWrapper) and type(model.lm_head) is nn.Linear
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*tie")
        model = adapted(tiny_llama(tie_word_embeddings=True), trainable_token_indices=[1, 2]).base_model.model
    head, embedding = model.lm_head, model.model.embed_tokens
    assert isinstance(head, TrainableTokensWrapper) and isinstance(embedding, TrainableTokensWrapper)
    assert head.token_adapter.trainable_tokens_delta is embedding.token_adapter.trainable_tokens_delta
