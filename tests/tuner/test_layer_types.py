# SPDX-License-Identifier: Apache-2.0
"""Layer types: which one serves a module, and what a new one needs."""

from functools import partial

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_spp import SPPConfig
from peft_spp.tuner import layer_types
from peft_spp.tuner.layer import Linear
from peft_spp.tuner.layer_types import LAYER_TYPES, Request, find_layer_type
from peft_spp.tuner.param_wrapper import ParamWrapper
from peft_spp.tuner.quantized import QuantizedLinear
from peft_spp.tuner.weight_access import Plain

from helpers import reference


class Map(nn.Module):
    """y = x Wᵀ, of another package: neither an `nn.Linear` nor a `Conv1D`."""

    def __init__(self, n, m):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(m, n))
        self.in_features, self.out_features, self.bias = n, m, None

    def forward(self, x):
        return x @ self.weight.T


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.map, self.linear = Map(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.linear(self.map(x))


def adapted_map(request):
    return partial(Linear) if isinstance(request.base_layer, Map) else None


def test_a_module_of_no_known_type_is_refused():
    with pytest.raises(ValueError, match=r"Target module 'map'.*is not supported"):
        get_peft_model(Net(), SPPConfig(target_modules=["map"], r=4))


def test_a_new_type_is_a_function_in_the_list(monkeypatch):
    monkeypatch.setattr(layer_types, "LAYER_TYPES", (adapted_map, *LAYER_TYPES))
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        net.map.weight[torch.rand(8, 6) < 0.5] = 0.0
    weight, x = net.map.weight.detach().clone(), torch.randn(3, 6)
    before = net(x)
    model = get_peft_model(net, SPPConfig(target_modules=["map", "linear"], r=4))
    assert torch.equal(model(x), before)
    layer = model.base_model.model.map
    nn.init.normal_(layer.spp_B["default"].weight)
    model(x).sum().backward()
    assert layer.spp_A["default"].weight.grad.any()
    (factors,) = layer.get_factors(["default"])
    expected = reference.linear(x.double(), weight.double(), None, [factors])
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-6)
    merged = model.merge_and_unload()
    assert type(merged.map) is Map and (merged.map.weight[weight == 0] == 0).all()
    torch.testing.assert_close(merged.map(x).double(), expected, rtol=1e-5, atol=1e-6)


class Pointwise(Plain):
    """A weight of shape (outputs, inputs, 1), as convolutions with a kernel of one have it."""

    def rows(self, weight):
        return weight[..., 0]

    def stored(self, weight):
        return weight.unsqueeze(-1)


class PointwiseMap(Map):
    def __init__(self, n, m):
        super().__init__(n, m)
        self.weight = nn.Parameter(self.weight.detach().unsqueeze(-1))

    def forward(self, x):
        return x @ self.weight[..., 0].T


def test_a_weight_in_another_shape_is_two_methods(monkeypatch):
    monkeypatch.setattr(layer_types, "LAYER_TYPES", (lambda request: partial(Linear, backend=Pointwise()),))
    torch.manual_seed(0)
    net = nn.Sequential(PointwiseMap(6, 8))
    with torch.no_grad():
        net[0].weight[torch.rand(8, 6) < 0.5] = 0.0
    weight, x = net[0].weight.detach().clone(), torch.randn(3, 6)
    model = get_peft_model(net, SPPConfig(target_modules=["0"], r=4, init_weights=False))
    layer = model.base_model.model[0]
    expected = reference.linear(x.double(), weight[..., 0].double(), None, layer.get_factors(["default"]))
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.weight, weight + layer.get_delta_weight("default"))
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-6)
    model.unmerge_adapter()
    assert torch.equal(layer.get_base_layer().weight, weight)
    merged = model.merge_and_unload()
    assert merged[0].weight.shape == weight.shape and (merged[0].weight[weight == 0] == 0).all()


@pytest.mark.parametrize(
    ("module", "parameter", "cls"),
    [(nn.Linear(4, 4), None, Linear), (Map(4, 4), "weight", ParamWrapper), (None, None, QuantizedLinear)],
)
def test_each_type_knows_its_modules(module, parameter, cls):
    if module is None:
        from peft_spp.compressed import CompressedLinear

        module = CompressedLinear.from_linear(nn.Linear(64, 4))
    make = find_layer_type(Request(module, SPPConfig(), "name", parameter, {}))
    assert make.func is cls
