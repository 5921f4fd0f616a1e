# SPDX-License-Identifier: Apache-2.0
"""Merged against unmerged logits, within the bounds of docs/reliability.md."""

import pytest
import torch
from peft import get_peft_model

from peft_spp import SPPConfig
from peft_spp.functional.kernels import by_activation

from helpers.tiny import block_linears, prune_, randomize, tiny_llama


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def unit(dtype):
    """The relative error of one rounding; the model itself has float32 in its norms and rotations."""
    return torch.finfo(dtype).eps / 2


def adapted_llama(dtype, adapters):
    model = tiny_llama()
    for layer in block_linears(model).values():
        prune_(layer.weight, "2:4")
    model = get_peft_model(model.to(dtype), SPPConfig(r=4, task_type="CAUSAL_LM")).eval()
    for index in range(1, adapters):
        model.add_adapter(f"adapter{index}", SPPConfig(r=3 + index, task_type="CAUSAL_LM"))
    model.base_model.set_adapter(list(model.peft_config))
    randomize(model)
    return model


def logits(model, tokens):
    ids = torch.randint(0, 64, (1, tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapters", [1, 2])
def test_by_weight_they_differ_by_the_order_of_the_adapters_at_most(dtype, adapters):
    model = adapted_llama(dtype, adapters)
    layers = len(block_linears(model))
    unmerged = logits(model, 24).double()
    model.merge_adapter()
    merged = logits(model, 24).double()
    # with one adapter the weights are the same bits, and so are the logits (tests/tuner/test_merging.py)
    assert (merged - unmerged).norm() <= layers**0.5 * unit(dtype) * merged.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapters", [1, 2])
def test_by_activation_they_are_within_the_rounding_of_all_layers(monkeypatch, dtype, adapters):
    monkeypatch.setattr(by_activation, "_LEAST_ELEMENTS", 0)
    linear, calls = by_activation.linear, []
    monkeypatch.setattr(by_activation, "linear", lambda *args: calls.append(1) or linear(*args))
    model = adapted_llama(dtype, adapters)
    layers = len(block_linears(model))
    unmerged = logits(model, 1).double()
    assert len(calls) == layers
    model.merge_adapter()
    merged = logits(model, 1).double()
    assert (merged - unmerged).norm() <= layers**0.5 * (adapters + 1) * unit(dtype) * merged.norm()
