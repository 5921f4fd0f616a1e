# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._dynamo.testing import CompileCounter

from peft_spp import SPPConfig

from helpers.tiny import MLP, randomize, tiny_llama


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(model, x):
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return [y.detach().clone()] + [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("ranks", [[4], [7], [4, 3]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_layers_train_in_one_graph_to_the_same_gradients(ranks, dtype):
    torch.manual_seed(0)
    model = get_peft_model(MLP().to(dtype), SPPConfig(r=ranks[0], target_modules=["lin0"], init_weights=False))
    for i, r in enumerate(ranks[1:]):
        model.add_adapter(f"a{i}", SPPConfig(r=r, target_modules=["lin0"], init_weights=False))
        model.base_model.set_adapter(["default", f"a{i}"])
    x = torch.randn(5, 12, dtype=dtype)
    eager = step(model, x)
    compiled = step(torch.compile(model, fullgraph=True), x)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.05}
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_compiled_dropout_has_no_graph_break():
    model = get_peft_model(MLP(), SPPConfig(r=4, target_modules=["lin0"], init_weights=False, spp_dropout=0.2)).train()
    torch.compile(model, fullgraph=True, backend="aot_eager")(torch.randn(5, 12)).sum().backward()


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_without_gradients_is_one_graph(grad_mode):
    model = get_peft_model(tiny_llama(), SPPConfig(r=4, init_weights=False)).eval()
    ids = torch.randint(0, 64, (2, 8))
    with grad_mode():
        expected = model(input_ids=ids).logits
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(input_ids=ids).logits
    torch.testing.assert_close(compiled, expected)


def test_a_frozen_adapter_is_one_graph_where_gradients_are_on():
    model = get_peft_model(tiny_llama(), SPPConfig(r=4, init_weights=False)).eval().requires_grad_(False)
    ids = torch.randint(0, 64, (2, 8))
    expected = model(input_ids=ids).logits
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(input_ids=ids).logits
    torch.testing.assert_close(compiled, expected)


def test_no_more_recompilation_than_lora():
    def compilations(config):
        torch._dynamo.reset()
        model = get_peft_model(tiny_llama(), config)
        counter = CompileCounter()
        compiled = torch.compile(model, backend=counter)
        for length in (8, 8, 12, 16):
            ids = torch.randint(0, 64, (2, length))
            compiled.train()
            compiled(input_ids=ids, labels=ids).loss.backward()
            compiled.eval()
            with torch.no_grad():
                compiled(input_ids=ids)
        return counter.frame_count

    assert compilations(SPPConfig(r=4)) <= compilations(LoraConfig(r=4, target_modules="all-linear"))


def test_compiled_llama_gives_the_same_loss():
    model = get_peft_model(tiny_llama(), SPPConfig(r=4))
    randomize(model)
    ids = torch.arange(10).view(1, 10)
    eager = model(input_ids=ids, labels=ids).loss
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(eager, compiled)
