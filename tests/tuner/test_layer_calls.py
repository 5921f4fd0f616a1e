# SPDX-License-Identifier: Apache-2.0
"""Calls of a layer itself, with all that they may be given."""

import math

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_spp import SPPConfig


class Scaling(nn.Linear):
    """A linear layer whose call takes more than its input."""

    def forward(self, x, *factors, shift=0.0):
        return super().forward(x) * math.prod(factors) + shift


class Model(nn.Module):
    def __init__(self, kind=nn.Linear):
        super().__init__()
        self.lin = kind(6, 8)
        self.other = nn.Linear(6, 8)

    def forward(self, x, *args, **kwargs):
        return self.lin(x, *args, **kwargs)


def adapted(kind=nn.Linear, **settings):
    torch.manual_seed(0)
    config = {"r": 2, "target_modules": ["lin"], "init_weights": False, **settings}
    model = get_peft_model(Model(kind).double(), SPPConfig(**config))
    model.add_adapter("b", SPPConfig(**{**config, "r": 3}))
    return model.double().eval(), model.base_model.model.lin


def update(layer, x, name):
    return x @ layer.get_delta_weight(name).T


X = torch.randn(4, 6, dtype=torch.double, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_what_the_base_layer_takes_besides_its_input_reaches_it(dropout):
    _, layer = adapted(Scaling, spp_dropout=dropout)
    expected = layer.base_layer(X, 2.0, 3.0, shift=1.0) + update(layer, X, "default")
    torch.testing.assert_close(layer(X, 2.0, 3.0, shift=1.0), expected)
    layer.merge()
    torch.testing.assert_close(layer(X, 2.0, shift=1.0), layer.base_layer(X, 2.0, shift=1.0))
    layer.enable_adapters(False)
    torch.testing.assert_close(layer(X, 2.0, shift=1.0), layer.base_layer(X, 2.0, shift=1.0))


def test_so_it_does_in_a_mixed_batch():
    _, layer = adapted(Scaling)
    names = ["b", "__base__", "default", "b"]
    expected = layer.base_layer(X, 2.0, 3.0, shift=1.0).detach().clone()
    for row, name in enumerate(names):
        if name != "__base__":
            expected[row] += update(layer, X[row], name)
    torch.testing.assert_close(layer(X, 2.0, 3.0, shift=1.0, adapter_names=names), expected)


def spoil(layer, name):
    with torch.no_grad():
        layer.spp_A[name].weight[0, 0] = math.nan


def test_a_merge_is_only_safe_if_asked():
    _, layer = adapted()
    before = layer.get_base_layer().weight.detach().clone()
    spoil(layer, "b")
    layer.merge(adapter_names=["default"], safe_merge=True)
    layer.unmerge()
    with pytest.raises(ValueError, match="'lin'") as raised:
        layer.merge(safe_merge=True, adapter_names=["default", "b"])
    assert "default" not in str(raised.value)  # it is not the broken one
    assert torch.equal(layer.get_base_layer().weight, before) and layer.merged_adapters == []
    layer.merge(adapter_names=["b"])
    assert layer.get_base_layer().weight.isnan().any()


def test_where_no_factor_is_broken_by_itself_all_are_named():
    _, layer = adapted()
    with torch.no_grad():
        for name in ("default", "b"):
            layer.spp_A[name].weight.fill_(1e200)
            layer.spp_B[name].weight.fill_(1e200)
    with pytest.raises(ValueError, match=r"default,b"):
        layer.merge(safe_merge=True, adapter_names=["default", "b"])


def test_a_merge_is_checked_for_the_adapters_asked_for():
    _, layer = adapted()
    spoil(layer, "b")
    layer.check_merge()
    layer.check_merge(["default", "not here"])
    layer.check_merge([])
    for names in (["b"], ["default", "b"]):
        with pytest.raises(ValueError, match="'lin'"):
            layer.check_merge(names)
    layer.merge(adapter_names=["b"])
    layer.check_merge(["b"])  # merged already
    with pytest.raises(ValueError, match="'lin'"):
        layer.check_merge(["default"])


def test_factors_are_those_of_the_names_that_the_layer_has():
    _, layer = adapted(spp_alpha=6)
    factors = layer.get_factors(["b", "not here", "default"])
    assert [f.scaling for f in factors] == [2.0, 3.0]
    assert factors[0].A is layer.spp_A["b"].weight and factors[1].B is layer.spp_B["default"].weight


@pytest.mark.parametrize("init_weights", [True, False])
def test_factors_can_be_drawn_again(init_weights):
    _, layer = adapted()
    before = layer.spp_A["b"].weight.detach().clone()
    layer.reset_spp_parameters("b", init_weights)
    assert not torch.equal(layer.spp_A["b"].weight, before)
    assert bool(layer.spp_B["b"].weight.any()) is not init_weights
    if not init_weights:
        many = get_peft_model(
            nn.Sequential(nn.Linear(2, 4000)), SPPConfig(r=2, target_modules=["0"], init_weights=False)
        )
        B = many.base_model.model[0].spp_B["default"].weight
        assert -1 <= B.min() < -0.99 and 0.99 < B.max() <= 1 and abs(B.mean()) < 0.05


def test_a_new_adapter_of_a_merged_layer_is_on_the_unmerged_weight():
    _, layer = adapted()
    expected = layer.get_delta_weight("b")
    unmerged = layer.get_base_layer().weight.detach().clone()
    layer.merge(adapter_names=["default"])
    assert torch.equal(layer.unmerged_weight(), unmerged)
    assert torch.equal(layer.get_delta_weight("b"), expected)
    layer.unmerge()
    with pytest.warns(UserWarning):
        layer.unmerge()


def test_the_rank_and_its_error():
    _, layer = adapted()
    for r in (0, -1, 2.5):
        with pytest.raises(ValueError, match=str(r)):
            layer.update_layer("c", r, 1.0, SPPConfig())
    assert "c" not in layer.r and "c" not in layer.spp_A


def test_a_call_of_a_layer_with_hooks_or_a_forward_of_its_own_is_left_to_it():
    for spoilt in ("hook", "pre-hook", "backward hook", "backward pre-hook", "own forward"):
        _, layer = adapted()
        expected = layer(X)
        calls = []
        base = layer.base_layer
        if spoilt == "hook":
            base.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        elif spoilt == "pre-hook":
            base.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        elif spoilt == "backward hook":
            base.register_full_backward_hook(lambda *_, calls=calls: calls.append(1))
        elif spoilt == "backward pre-hook":
            base.register_full_backward_pre_hook(lambda *_, calls=calls: calls.append(1))
        else:
            forward = base.forward
            base.forward = lambda x, calls=calls, forward=forward: calls.append(1) or forward(x)
        y = layer(X.clone().requires_grad_())
        torch.testing.assert_close(y, expected)
        y.sum().backward()
        assert calls, spoilt


def test_the_base_layer_is_not_called_where_one_matmul_will_do(monkeypatch):
    _, layer = adapted()
    expected = layer(X)
    monkeypatch.setattr(nn.Linear, "__call__", lambda *_: pytest.fail("the base layer was called"))
    assert torch.equal(layer(X), expected)


def test_dropout_is_off_in_eval_mode_and_for_a_share_of_zero():
    model, layer = adapted(spp_dropout=0.5)
    model.add_adapter("c", SPPConfig(r=2, target_modules=["lin"], spp_dropout=0.0, init_weights=False))
    model.double()
    assert isinstance(layer.spp_dropout["c"], nn.Identity) and layer.spp_dropout["b"].p == 0.5
    model.base_model.set_adapter(["b", "c"])
    model.train()
    torch.manual_seed(0)
    first = layer(X)
    torch.manual_seed(1)
    assert not torch.equal(layer(X), first)
    model.eval()
    expected = layer.base_layer(X) + update(layer, X, "b") + update(layer, X, "c")
    torch.testing.assert_close(layer(X), expected)
    layer.train()
    layer.spp_dropout["b"].p = 0.0
    torch.testing.assert_close(layer(X), expected)
