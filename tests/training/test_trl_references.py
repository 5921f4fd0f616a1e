# SPDX-License-Identifier: Apache-2.0
"""What TRL takes for the reference of a policy: the base model, or a copy of the adapter it was given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import Trainer
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import utils
from trl.trainer.utils import use_adapter

from peft_spp.tuner import SPPConfig, SPPLayer

from helpers.tiny import randomize
from helpers.trl_cases import (
    WITH_REFERENCE,
    assert_equal,
    assert_zeros_kept,
    base_weights,
    factors,
    losses,
    make_trainer,
    pruned_model,
    slow,
    spp_config,
)


def trained_adapter(folder: Path) -> str:
    """A saved adapter with factors that are not zero."""
    model = get_peft_model(pruned_model(), spp_config())
    torch.manual_seed(5)
    randomize(model, scale=0.3)
    model.save_pretrained(folder)
    return str(folder)


def record_reference(trainer: Trainer) -> list[tuple[Any, torch.Tensor]]:
    """Fill a list, as the trainer runs, with what the model gets and gives while its adapter is disabled."""
    layer = next(module for module in trainer.model.modules() if isinstance(module, SPPLayer))
    seen: list[tuple[Any, torch.Tensor]] = []

    def remember(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if kwargs.get("fused_lm_head") and layer.disable_adapters:
            seen.append((kwargs, output.log_probs.clone()))

    trainer.model.register_forward_hook(remember, with_kwargs=True)
    return seen


def log_probs(model: nn.Module, kwargs: dict[str, Any]) -> torch.Tensor:
    """The per-token log-probabilities of a model, by the log-softmax of its logits."""
    with torch.no_grad():
        logits = model(input_ids=kwargs["input_ids"], attention_mask=kwargs["attention_mask"]).logits[:, :-1]
    labels = kwargs["labels"][:, 1:]
    picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return picked.masked_fill(labels == -100, 0.0)


@pytest.mark.parametrize("kind", WITH_REFERENCE)
def test_the_reference_of_a_new_adapter_is_the_base_model(kind: str, tmp_path: Path) -> None:
    trainer = make_trainer(kind, tmp_path)
    assert trainer.ref_model is None and list(trainer.model.peft_config) == ["default"]
    torch.manual_seed(1)
    randomize(trainer.model, scale=0.3)  # so that the policy is far from its reference
    references = record_reference(trainer)
    trainer.train()
    base = pruned_model()
    assert references
    for kwargs, values in references:
        torch.testing.assert_close(values, log_probs(base, kwargs), atol=1e-5, rtol=1e-5)
        assert (values - log_probs(trainer.model, kwargs)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["dpo", "grpo", slow("kto")])
def test_the_reference_of_a_trained_adapter_is_a_frozen_copy(kind: str, tmp_path: Path) -> None:
    """Given a PeftModel, TRL adds an adapter "ref" with the same configuration and copies the factors by name."""
    folder = trained_adapter(tmp_path / "adapter")
    model = PeftModel.from_pretrained(pruned_model(), folder, is_trainable=True)
    start, before = factors(model), base_weights(model)
    trainer = make_trainer(kind, tmp_path, model)
    reference = {name.replace(".ref.", ".default."): factor for name, factor in factors(trainer.model, "ref").items()}
    assert_equal(reference, start)
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if ".ref." in name)

    trainer.train()
    after = factors(trainer.model)
    assert all(not torch.equal(factor, start[name]) for name, factor in after.items())
    reference = {name.replace(".ref.", ".default."): factor for name, factor in factors(trainer.model, "ref").items()}
    assert_equal(reference, start)
    assert trainer.model.active_adapter == "default"
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trainable == set(after)
    assert_zeros_kept(trainer.model, before)


def test_use_adapter_gives_the_copy_and_the_policy_back(tmp_path: Path) -> None:
    folder = trained_adapter(tmp_path / "adapter")
    alone = PeftModel.from_pretrained(pruned_model(), folder).eval()
    trainer = make_trainer("dpo", tmp_path, PeftModel.from_pretrained(pruned_model(), folder, is_trainable=True))
    trainer.train()
    policy = trainer.model.eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        trained = policy(input_ids=ids).logits
        with use_adapter(policy, "ref"):
            assert torch.equal(policy(input_ids=ids).logits, alone(input_ids=ids).logits)
        with use_adapter(policy, None):
            assert torch.equal(policy(input_ids=ids).logits, pruned_model()(input_ids=ids).logits)
        assert torch.equal(policy(input_ids=ids).logits, trained)
    assert not torch.equal(trained, alone(input_ids=ids).logits)


@pytest.mark.parametrize("kind", ["dpo", slow("grpo"), slow("kto")])
def test_a_run_with_a_copied_reference_resumes_to_the_same_losses(kind: str, tmp_path: Path) -> None:
    folder = trained_adapter(tmp_path / "adapter")
    saving = {"save_strategy": "steps", "save_steps": 2}
    runs = []
    for checkpoint in (None, str(tmp_path / "out" / "checkpoint-2")):
        model = PeftModel.from_pretrained(pruned_model(), folder, is_trainable=True)
        trainer = make_trainer(kind, tmp_path / "out", model, **saving)
        trainer.train(resume_from_checkpoint=checkpoint)
        runs.append(trainer)
    unbroken, resumed = runs
    assert losses(resumed) == losses(unbroken) and len(losses(resumed)) == 3
    assert_equal(factors(resumed.model), factors(unbroken.model))
    assert_equal(factors(resumed.model, "ref"), factors(unbroken.model, "ref"))
    # the policy and its reference are saved side by side, and the policy loads alone
    assert (tmp_path / "out" / "checkpoint-3" / "ref" / "adapter_config.json").is_file()
    saved = PeftModel.from_pretrained(pruned_model(), str(tmp_path / "out" / "checkpoint-3"))
    assert_equal(factors(saved), factors(unbroken.model))


def test_precomputed_reference_log_probabilities_are_those_of_the_base_model(tmp_path: Path) -> None:
    direct = make_trainer("dpo", tmp_path / "direct")
    direct.train()
    precomputed = make_trainer("dpo", tmp_path / "precomputed", precompute_ref_log_probs=True)
    precomputed.train()
    assert losses(precomputed) == pytest.approx(losses(direct), rel=1e-5)


def test_weights_for_vllm_are_the_merged_weights(tmp_path: Path) -> None:
    """GRPO with vLLM merges, reads every parameter by the base model's name, and unmerges. vLLM itself is not run."""
    trainer = make_trainer("grpo", tmp_path, beta=0.0)
    trainer.train()
    model, before = trainer.model, base_weights(trainer.model)
    generation = VLLMGeneration.__new__(VLLMGeneration)
    generation.model, generation._dist = model, DistributedBackend(trainer.accelerator)
    sent = {name: weight.clone() for name, weight in generation._iter_named_params()}
    assert_equal(before, base_weights(model))  # exactly as before the merge
    merged = model.merge_and_unload()
    assert_equal(sent, {name: parameter.detach() for name, parameter in merged.named_parameters()})
    assert sent.keys() == dict(pruned_model().named_parameters()).keys()


@pytest.mark.skipif(not hasattr(utils, "add_fused_lm_head"), reason="TRL 1.14 and older do not replace the forward")
def test_the_fused_head_sees_the_adapter() -> None:
    """TRL replaces the base model's forward, under PEFT's wrapper, by one that calls backbone and head itself."""
    model = get_peft_model(pruned_model(), SPPConfig(task_type="CAUSAL_LM", r=4)).eval()
    randomize(model, scale=0.3)
    ids = torch.arange(2, 20).reshape(2, 9)
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    expected = log_probs(model, kwargs)
    utils.add_fused_lm_head(model.get_base_model())
    with torch.no_grad():
        actual = model(**kwargs, fused_lm_head=True).log_probs
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
