# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from peft_spp.tuner.param_wrapper import replaced_parameter


def double(weight):
    return 2 * weight


def test_only_while_the_context_is_open_and_computed_once():
    layer, calls = nn.Linear(3, 2), []

    def compute(weight):
        calls.append(weight)
        return 2 * weight

    cls, state = type(layer), dict(layer.__dict__)
    with replaced_parameter(layer, "weight", compute):
        assert torch.equal(layer.weight, 2 * layer._parameters["weight"])
        assert layer.weight is layer.weight and isinstance(layer, nn.Linear)
        assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert len(calls) == 1 and calls[0] is layer.weight
    assert type(layer) is cls and layer.__dict__ == state


def test_several_parameters_and_the_same_one_twice():
    layer = nn.Linear(3, 2)
    weight, bias = layer.weight, layer.bias
    with replaced_parameter(layer, "weight", double), replaced_parameter(layer, "bias", double):
        assert torch.equal(layer.weight, 2 * weight) and torch.equal(layer.bias, 2 * bias)
        with replaced_parameter(layer, "weight", torch.neg):
            assert torch.equal(layer.weight, -weight)
        assert torch.equal(layer.weight, 2 * weight) and torch.equal(layer.bias, 2 * bias)
    assert layer.weight is weight and layer.bias is bias


def test_the_parameter_is_back_after_an_error():
    layer = nn.Linear(3, 2)
    weight, cls = layer.weight, type(layer)
    with pytest.raises(KeyError), replaced_parameter(layer, "weight", double):
        raise KeyError
    assert layer.weight is weight and type(layer) is cls


def test_an_attribute_error_does_not_give_the_parameter_as_it_is():
    layer = nn.Linear(3, 2)
    with replaced_parameter(layer, "weight", lambda weight: weight.no_such_attribute):
        with pytest.raises(RuntimeError, match="weight"):
            layer(torch.randn(1, 3))


def test_a_parameter_that_is_put_in_place_meanwhile_is_the_one_to_use():
    layer = nn.Linear(3, 2, device="meta")
    weight = nn.Parameter(torch.randn(2, 3))
    with replaced_parameter(layer, "weight", double):
        assert layer.weight.is_meta
        layer._parameters["weight"] = weight
        assert torch.equal(layer.weight, 2 * weight)


def test_a_parametrization_comes_first():
    class Square(nn.Module):
        def forward(self, x):
            return x**2

    layer = nn.Linear(3, 2)
    parametrize.register_parametrization(layer, "weight", Square())
    expected = layer.weight
    with replaced_parameter(layer, "weight", double):
        assert torch.equal(layer.weight, 2 * expected) and layer.weight is layer.weight
    assert torch.equal(layer.weight, expected)


def test_the_module_has_the_same_class_every_time():
    layer, classes = nn.Linear(3, 2), []
    for _ in range(2):
        with replaced_parameter(layer, "weight", double):
            classes.append(type(layer))
    # torch.compile compiles again for each class
    assert classes[0] is classes[1] is not nn.Linear
