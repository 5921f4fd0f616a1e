# SPDX-License-Identifier: Apache-2.0
"""Base layers that are quantized, cast or given another weight once they have an adapter."""

import warnings

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_spp import SPPConfig
from peft_spp.tuner.quantized import QuantizedLinear

from helpers import reference
from helpers.tiny import MLP, is_positive_zero, prune_, randomize


torchao = pytest.importorskip("torchao.quantization")
CONFIGS = {
    "int8": torchao.Int8WeightOnlyConfig,
    "int8-dynamic": torchao.Int8DynamicActivationInt8WeightConfig,
    "intx": torchao.IntxWeightOnlyConfig,
}
X = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))


def of_base_layers(module: nn.Module, name: str) -> bool:
    return name.endswith("base_layer")


def adapted(**settings):
    torch.manual_seed(0)
    base = MLP().eval()
    for layer in (base.lin0, base.lin1):
        prune_(layer.weight, "0.5")
    model = get_peft_model(base, SPPConfig(**{"r": 3, "target_modules": ["lin0", "lin1"], **settings}))
    randomize(model)
    return model.eval()


def layers(model):
    return [model.base_model.model.lin0, model.base_model.model.lin1]


@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_quantizing_before_and_after_gives_the_same(kind, before):
    model = adapted()
    plain = model(X)
    if before:
        weights = {name: p.clone() for name, p in model.named_parameters() if ".spp_" in name}
        base = model.unload()
        torchao.quantize_(base, CONFIGS[kind]())
        model = get_peft_model(base, SPPConfig(r=3, target_modules=["lin0", "lin1"])).eval()
        model.load_state_dict(weights, strict=False)
    else:
        torchao.quantize_(model, CONFIGS[kind](), filter_fn=of_base_layers)
    output = model(X)
    assert 0 < (output - plain).abs().max() < 0.05 * plain.abs().max()
    for layer in layers(model):
        assert type(layer) is QuantizedLinear
    x = X
    for layer in layers(model):
        weight = layer.get_base_layer().weight.dequantize()
        x = reference.linear(x, weight, layer.get_base_layer().bias, layer.get_factors(["default"]))
        x = x.relu() if layer is layers(model)[0] else x
    torch.testing.assert_close(output.double(), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_training_and_merging_go_on(kind):
    model = adapted()
    zeros = [layer.get_base_layer().weight == 0 for layer in layers(model)]
    torchao.quantize_(model, CONFIGS[kind](), filter_fn=of_base_layers)
    model(X).square().sum().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for name, p in model.named_parameters() if ".spp_" in name
    )
    output = model(X)
    packed = [layer.get_base_layer().weight.dequantize() for layer in layers(model)]
    with pytest.warns(UserWarning, match="rounding"):
        model.merge_adapter()
    torch.testing.assert_close(model(X), output, rtol=0.1, atol=0.1)
    model.unmerge_adapter()
    assert all(
        torch.equal(a, b.get_base_layer().weight.dequantize()) for a, b in zip(packed, layers(model), strict=True)
    )
    merged = model.merge_and_unload(safe_merge=True, dequantize=True)
    # activations are quantized as well with one of the formats, and not in the merged model
    torch.testing.assert_close(merged(X), output, rtol=0.05, atol=0.05)
    for layer, mask in zip((merged.lin0, merged.lin1), zeros, strict=True):
        assert type(layer) is nn.Linear and is_positive_zero(layer.weight[mask]).all()


def test_merging_is_the_first_thing_after_quantizing():
    model = adapted()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), filter_fn=of_base_layers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = model.merge_and_unload()
    assert all(not isinstance(layer, QuantizedLinear) for layer in merged.modules())
    assert merged(X).isfinite().all()


def test_quantizing_while_an_adapter_is_merged_is_refused():
    model = adapted()
    model.merge_adapter()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), filter_fn=of_base_layers)
    for call in (model.unmerge_adapter, model.merge_and_unload, lambda: model(X)):
        with pytest.raises(ValueError, match=r"'lin0'.*unmerge_adapter.*before"):
            call()


def test_quantized_factors_are_refused_with_the_filter_to_use():
    model = adapted()
    torchao.quantize_(
        model, torchao.Int8WeightOnlyConfig(), filter_fn=lambda _, name: name.endswith(("base_layer", "spp_A.default"))
    )
    with pytest.raises(ValueError, match=r"'lin0'.*factors.*filter_fn"):
        model(X)


def test_a_quantized_parameter_is_refused():
    model = adapted(target_modules=[], target_parameters=["lin0.weight"])
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), filter_fn=of_base_layers)
    with pytest.raises(ValueError, match=r"'lin0\.weight'.*Quantize the base model first"):
        model(X)


def test_a_base_layer_that_is_replaced_by_an_unknown_one_is_refused():
    model = adapted()
    layers(model)[0].base_layer = nn.Conv1d(12, 20, 1)
    layers(model)[0].base_layer.weight = None
    with pytest.raises(ValueError, match=r"'lin0' \(Conv1d, NoneType\)"):
        model(X)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_base_layers_may_be_cast(dtype):
    model = adapted()
    expected = model(X)
    for layer in layers(model):
        layer.get_base_layer().to(dtype)
    output = model(X.to(dtype))
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(merged(X.to(dtype)).float(), output.float(), rtol=0.05, atol=0.05)
    assert merged.lin0.weight.dtype == dtype


def test_a_base_layer_may_get_another_weight():
    model = adapted()
    new = torch.randn(20, 12)
    layers(model)[0].get_base_layer().weight = nn.Parameter(new.clone(), requires_grad=False)
    weight = reference.effective_weight(new, layers(model)[0].get_factors(["default"]))
    torch.testing.assert_close(layers(model)[0].weight.double(), weight, rtol=1e-5, atol=1e-6)
    output = model(X)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged.lin0.weight.double(), weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged(X), output)
