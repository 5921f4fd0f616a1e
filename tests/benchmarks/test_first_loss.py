# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from peft import get_peft_model

from benchmarks.first_loss import loss_bound
from peft_spp import SPPConfig

from helpers.tiny import randomize, tiny_llama


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2, 1e4])
def test_finite_factors_cannot_bring_the_loss_above_the_bound(scale: float) -> None:
    model = tiny_llama()
    with torch.no_grad():
        # a head and a norm that say something
        model.lm_head.weight.normal_()
        model.model.norm.weight.uniform_(0.5, 2.0)
    bound = loss_bound(model)
    adapted = get_peft_model(model, SPPConfig(task_type="CAUSAL_LM"))
    randomize(adapted, scale)
    ids = torch.randint(64, (4, 16))
    with torch.no_grad():
        loss = adapted(input_ids=ids, labels=ids).loss.item()
    assert 0 < loss < bound < 1000
