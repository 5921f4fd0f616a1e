# SPDX-License-Identifier: Apache-2.0
"""Every competitor computes what its formula says, in float64, and trains what it should."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.competitors import COMPETITORS
from benchmarks.competitors.block_linears import block_linear_names, block_linear_suffixes
from benchmarks.models import build_linear_stack, copy_with_shared_weights

from helpers import reference
from helpers.tiny import tiny_llama


M, N = 32, 12
CPU = torch.device("cpu")


def adapted_layer(name):
    """One layer with random factors, its base weight and its trained parameters by the ends of their names."""
    base = build_linear_stack(M, N, 1, torch.float64, CPU, seed=0)
    model = copy_with_shared_weights(base)
    COMPETITORS[name].adapt(model)
    layer = model.linears()[0]
    torch.manual_seed(1)
    for parameter in layer.parameters():
        if parameter.requires_grad and parameter.shape != (M, N):
            nn.init.normal_(parameter)
    trained = {key: parameter.detach() for key, parameter in layer.named_parameters() if parameter.requires_grad}
    return layer, base.linears()[0].weight.detach(), trained


def pick(trained, part):
    (value,) = (value for key, value in trained.items() if part in key)
    return value


def effective_weight(name, W, trained):
    """What x is multiplied with, written as in the papers."""
    if name in ("base", "masked_full"):
        return W
    if name == "lora":
        return W + 32 / 16 * pick(trained, "lora_B") @ pick(trained, "lora_A")
    if name == "hira":
        return W * (1 + pick(trained, "hira_B") @ pick(trained, "hira_A"))
    if name == "ia3":
        return W * pick(trained, "ia3_l").reshape(M, 1)
    if name == "masked_lora":
        return W + 32 / 16 * pick(trained, "B") @ pick(trained, "A") * (W != 0)
    prefix = "spp_" if name == "spp" else ""
    A, B = pick(trained, f"{prefix}A"), pick(trained, f"{prefix}B")
    return reference.effective_weight(W, [(A, B, 32 / 16)])


@pytest.mark.parametrize("name", COMPETITORS)
def test_forward_is_the_formula(name):
    layer, W, trained = adapted_layer(name)
    x = torch.randn(2, 3, N, dtype=torch.double)
    expected = x @ effective_weight(name, W, trained).T
    torch.testing.assert_close(layer(x), expected)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("name", ["masked_lora", "spp_authors_repeat", "spp_authors_loop"])
def test_gradients_are_those_of_the_formula(name):
    layer, W, _ = adapted_layer(name)
    x = torch.randn(5, N, dtype=torch.double, requires_grad=True)
    grad_y = torch.randn(5, M, dtype=torch.double)
    inputs = (x, layer.A, layer.B)
    found = torch.autograd.grad(layer(x), inputs, grad_y)

    rows = torch.arange(M) // (M // 16)
    if name == "masked_lora":
        effective = W + 2 * (layer.B @ layer.A) * (W != 0)
    else:
        effective = W * (1 + 2 * layer.A[rows] * layer.B)
    expected = torch.autograd.grad(F.linear(x, effective), inputs, grad_y)
    torch.testing.assert_close(found, expected)


def test_the_two_forms_of_the_authors_code_agree():
    x = torch.randn(4, N, dtype=torch.double)
    outputs = []
    for name in ("spp", "spp_authors_repeat", "spp_authors_loop"):
        layer, _, trained = adapted_layer(name)
        torch.manual_seed(2)
        A, B = torch.randn(16, N, dtype=torch.double), torch.randn(M, 1, dtype=torch.double)
        for key, parameter in layer.named_parameters():
            if key in trained:
                parameter.data = A if parameter.shape == A.shape else B
        outputs.append(layer(x))
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(outputs[2], outputs[0])


def test_full_fine_tuning_masks_the_gradient_and_not_the_shared_weight():
    layer, W, _ = adapted_layer("masked_full")
    before = W.clone()
    layer(torch.randn(5, N, dtype=torch.double)).pow(2).sum().backward()
    assert torch.equal(layer.weight.grad != 0, W != 0)
    torch.optim.AdamW([layer.weight], lr=0.1).step()
    assert torch.equal(W, before)
    assert torch.equal(layer.weight != 0, W != 0)


@pytest.mark.parametrize("name", COMPETITORS)
def test_only_the_adapter_of_a_bfloat16_llama_is_trained_in_float32(name):
    base = tiny_llama().bfloat16()
    adapted = COMPETITORS[name].adapt(copy_with_shared_weights(base))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    layers = len(block_linear_names(base))
    assert len(trained) == layers * {"base": 0, "ia3": 1, "masked_full": 1}.get(name, 2)
    assert {parameter.dtype for parameter in trained} <= {torch.bfloat16 if name == "masked_full" else torch.float32}
    ids = torch.randint(0, 64, (2, 8))
    loss = adapted.train()(input_ids=ids, labels=ids).loss
    if name != "base":
        loss.backward()
    assert all(parameter.grad is not None for parameter in trained)


def test_copies_share_all_base_weights():
    base = tiny_llama()
    own = {id(parameter) for parameter in base.parameters()}
    adapted = COMPETITORS["spp"].adapt(copy_with_shared_weights(base))
    shared = [parameter for parameter in adapted.parameters() if not parameter.requires_grad]
    assert {id(parameter) for parameter in shared} == own
    assert not hasattr(base, "peft_config")


def test_layers_outside_the_blocks_are_left_alone():
    assert block_linear_suffixes(tiny_llama()) == [
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ]


def test_a_layer_outside_the_blocks_with_a_name_from_inside_is_an_error():
    model = tiny_llama()
    model.q_proj = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="'q_proj'"):
        block_linear_suffixes(model)


def test_the_authors_code_needs_r_to_divide_the_rows():
    model = build_linear_stack(20, N, 1, torch.float32, CPU, seed=0)
    with pytest.raises(ValueError, match="20"):
        COMPETITORS["spp_authors_loop"].adapt(model)
