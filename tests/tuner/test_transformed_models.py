# SPDX-License-Identifier: Apache-2.0
"""`torch.func` on adapted models."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

import peft_spp
from peft_spp import SPPConfig

from helpers.tiny import MLP, prune_


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 12, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("...i,eoi->...o", x, self.weight)


class Mixed(nn.Module):
    """A linear layer after a stack of weights."""

    def __init__(self, linear: nn.Module | None = None) -> None:
        super().__init__()
        self.experts = Stack()
        self.linear = nn.Linear(12, 6) if linear is None else linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.experts(x))


def adapted(model: nn.Module, **settings) -> nn.Module:
    model = get_peft_model(model, SPPConfig(r=3, init_weights=False, **settings))
    model.add_adapter("second", SPPConfig(r=2, init_weights=False, **settings))
    model.base_model.set_adapter(["default", "second"])
    return model


def quantized() -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(12, 64, compute_dtype=torch.float32, quant_type="nf4")
    model = MLP()
    model.lin0 = layer.to("cpu")
    model.lin1 = nn.Linear(64, 6)
    return model


MODELS = {
    "linear": lambda: adapted(MLP(), target_modules=["lin0", "lin1"]),
    "experts": lambda: adapted(Mixed(), target_modules=["linear"], target_parameters=["experts.weight"]),
    "quantized": lambda: adapted(quantized(), target_modules=["lin0", "lin1"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_every_sample(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    parameters = {key: parameter.detach() for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(parameters) == 8
    xs = torch.randn(4, 1, 12)

    def loss(values, x):
        return functional_call(model, values, (x,)).square().sum()

    found = vmap(grad(loss), (None, 0))(parameters, xs)
    for index, x in enumerate(xs):
        model.zero_grad()
        model(x).square().sum().backward()
        for key, parameter in model.named_parameters():
            if key in parameters:
                torch.testing.assert_close(found[key][index], parameter.grad, atol=1e-4, rtol=1e-4)
    # the derivative along a direction, forwards and by the gradient
    directions = {key: torch.randn_like(value) for key, value in parameters.items()}
    _, forwards = jvp(lambda values: loss(values, xs[0]), (parameters,), (directions,))
    backwards = sum((found[key][0] * direction).sum() for key, direction in directions.items())
    torch.testing.assert_close(forwards, backwards, atol=1e-3, rtol=1e-4)


def test_a_compiled_transform_is_the_transform():
    torch.manual_seed(0)
    model = MODELS["linear"]()
    parameters = {key: parameter.detach() for key, parameter in model.named_parameters() if parameter.requires_grad}
    xs = torch.randn(4, 1, 12)

    def samples(values, xs):
        return vmap(grad(lambda v, x: functional_call(model, v, (x,)).square().sum()), (None, 0))(values, xs)

    torch._dynamo.reset()
    found = torch.compile(samples, backend="aot_eager", fullgraph=True)(parameters, xs)
    for key, expected in samples(parameters, xs).items():
        torch.testing.assert_close(found[key], expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exported_program_can_be_trained(dtype: torch.dtype, compressed: bool, strict: bool) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16)).to(dtype)
    for layer in (base[0], base[2]):
        prune_(layer.weight, "0.5")
    if compressed:
        peft_spp.compress(base)
    config = SPPConfig(r=4, target_modules=["0", "2"], init_weights=False)
    model = get_peft_model(base, config, autocast_adapter_dtype=False).base_model.model
    x = torch.randn(3, 32, dtype=dtype)
    program = torch.export.export(model, (x,), strict=strict).module()
    gradients = []
    for one in (model, program):
        one(x).float().square().sum().backward()
        gradients.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == 4 and gradients[0].keys() == gradients[1].keys()
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.1}
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, **tolerance)
