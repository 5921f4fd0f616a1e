# SPDX-License-Identifier: Apache-2.0
import warnings

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_spp import SPPConfig
from peft_spp.functional import merged_weight
from peft_spp.tuner.quantized import dequantized_weight

from helpers import reference
from helpers.quantized_cases import (
    ALL,
    EXACT_ZERO,
    IN,
    OUT,
    OneLayer,
    equal_bits,
    packed_bits,
    pruned_linear,
    quantized,
)
from helpers.tiny import is_positive_zero, randomize


pytestmark = pytest.mark.filterwarnings("ignore:Merge spp module")


def spp_on(kind, **config):
    layer = quantized(kind, pruned_linear())
    model = get_peft_model(OneLayer(layer), SPPConfig(**{"r": 5, "target_modules": ["lin"], **config}))
    torch.manual_seed(1)
    randomize(model)
    return model, model.base_model.model.lin


@pytest.mark.parametrize("kind", EXACT_ZERO)
def test_merging_quantizes_the_scaled_weight_and_keeps_every_zero(kind):
    model, layer = spp_on(kind)
    before = dequantized_weight(layer.get_base_layer())
    expected = reference.effective_weight(before, layer.get_factors(["default"]))
    with pytest.warns(UserWarning, match="rounding errors"):
        model.merge_adapter()
    after = dequantized_weight(layer.get_base_layer())
    assert is_positive_zero(after[before == 0]).all()
    # half of the widest step between two codes, as a share of the largest weight of the block or row
    step = 0.17 if "4" in kind else 0.004
    assert ((after - expected).abs() <= step * 1.01 * expected.abs().amax()).all()
    # and it is what quantizing the merged weight gives
    plain = nn.Linear(IN, OUT)
    plain.weight.data.copy_(merged_weight(before, layer.get_factors(["default"])))
    assert torch.equal(after, dequantized_weight(quantized(kind, plain)))
    x = torch.randn(3, IN)
    assert torch.equal(model(x), layer.get_base_layer()(x))


@pytest.mark.parametrize("kind", [*EXACT_ZERO, "hqq", "bitmask"])
def test_unmerging_restores_every_bit(kind):
    model, layer = spp_on(kind)
    model.add_adapter("second", SPPConfig(r=3, target_modules=["lin"], init_weights=False))
    x = torch.randn(3, IN)
    y = model(x)
    before = packed_bits(layer.get_base_layer())
    model.merge_adapter(["default"])
    once = packed_bits(layer.get_base_layer())
    assert not equal_bits(before, once)
    model.merge_adapter(["second"])
    twice = packed_bits(layer.get_base_layer())
    model.base_model(x)
    model.unmerge_adapter()
    assert equal_bits(before, packed_bits(layer.get_base_layer()))
    assert torch.equal(model(x), y)
    # one merge after another gives the bits of one merge of both
    model.merge_adapter(["second", "default"])
    assert equal_bits(twice, packed_bits(layer.get_base_layer()))
    with model.disable_adapter():
        model(x)
    assert equal_bits(before, packed_bits(layer.get_base_layer()))


@pytest.mark.parametrize("kind", ["nf4-double", "int8", "torchao-int8", "hqq", "bitmask"])
def test_delta_weight_is_of_the_unmerged_weight(kind):
    model, layer = spp_on(kind)
    weight = dequantized_weight(layer.get_base_layer())
    expected = reference.effective_weight(weight, layer.get_factors(["default"]), identity=False)
    for _ in range(2):
        torch.testing.assert_close(layer.get_delta_weight("default").double(), expected, rtol=1e-5, atol=1e-6)
        model.merge_adapter()


@pytest.mark.parametrize("kind", ALL)
def test_merging_into_a_dequantized_model_is_exact(kind):
    model, layer = spp_on(kind)
    base = layer.get_base_layer()
    weight, bias, factors = dequantized_weight(base), base.bias, layer.get_factors(["default"])
    merged = model.merge_and_unload(dequantize=True)
    assert type(merged.lin) is nn.Linear and not merged.lin.weight.requires_grad
    expected = reference.effective_weight(weight, factors)
    torch.testing.assert_close(merged.lin.weight.double(), expected, rtol=1e-6, atol=1e-7)
    assert is_positive_zero(merged.lin.weight[weight == 0]).all()
    assert torch.equal(merged.lin.bias, bias)


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8", "bitmask"])
def test_a_dequantized_merge_after_a_merge_is_of_the_unmerged_weight(kind):
    expected = spp_on(kind)[0].merge_and_unload(dequantize=True).lin.weight
    model, _ = spp_on(kind)
    model.merge_adapter()
    assert torch.equal(model.merge_and_unload(dequantize=True).lin.weight, expected)


@pytest.mark.parametrize("kind", [*EXACT_ZERO, "hqq", "bitmask"])
def test_unloading_gives_back_the_base_layer(kind):
    model, layer = spp_on(kind)
    base, before = layer.get_base_layer(), packed_bits(layer.get_base_layer())
    unloaded = model.unload()
    assert unloaded.lin is base and equal_bits(before, packed_bits(base))
    model, layer = spp_on(kind)
    model.merge_adapter()
    merged, base = packed_bits(layer.get_base_layer()), layer.get_base_layer()
    model.unmerge_adapter()
    assert model.merge_and_unload().lin is base
    assert equal_bits(merged, packed_bits(base))


def test_a_dequantized_model_has_no_quantized_layer_left_and_one_dtype():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(IN).bfloat16()
            self.adapted = quantized("nf4", pruned_linear())
            self.other = quantized("int8", pruned_linear(1))

        def forward(self, x):
            return self.adapted(self.norm(x)) + self.other(self.norm(x))

    model = Model()
    x = torch.randn(2, IN).bfloat16()
    expected = model(x)
    model = get_peft_model(model, SPPConfig(r=4, target_modules=["adapted"])).merge_and_unload(dequantize=True)
    assert type(model.adapted) is type(model.other) is nn.Linear
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(model(x), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8"])
def test_a_broken_adapter_changes_nothing(kind, safe_merge):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = quantized(kind, pruned_linear(0))
            self.second = quantized(kind, pruned_linear(1))

    model = get_peft_model(Model(), SPPConfig(r=4, target_modules=["first", "second"]))
    randomize(model)
    layers = model.base_model.model
    layers.second.spp_B["default"].weight.data[3] = float("nan")
    before = [packed_bits(layer.get_base_layer()) for layer in (layers.first, layers.second)]
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="second"):
            merge(safe_merge=safe_merge)
    with pytest.raises(ValueError, match="second"):
        model.merge_and_unload(safe_merge=True, dequantize=True)
    assert not layers.first.merged
    for layer, bits in zip((layers.first, layers.second), before, strict=True):
        assert equal_bits(bits, packed_bits(layer.get_base_layer()))


def test_a_merge_that_would_lose_a_zero_is_refused_with_the_module_and_the_count():
    # In whole numbers from -8 to 7, HQQ's zero point is one too, and zeros are exact. Scaled weights have another.
    linear = pruned_linear()
    linear.weight.data = torch.randint(-8, 8, (OUT, IN)).float()
    linear.weight.data.view(-1, 64)[:, 0], linear.weight.data.view(-1, 64)[:, 1] = -8.0, 7.0
    zeros = int((linear.weight == 0).sum())
    model = get_peft_model(OneLayer(quantized("hqq", linear)), SPPConfig(r=4, target_modules=["lin"]))
    layer = model.base_model.model.lin
    assert int((dequantized_weight(layer.get_base_layer()) == 0).sum()) == zeros
    randomize(model)
    before = packed_bits(layer.get_base_layer())
    with pytest.raises(ValueError, match=r"'lin'.* (\d+) zero weights.*dequantize=True") as caught:
        model.merge_adapter()
    assert 0 < int(str(caught.value).split(" zero weights")[0].split()[-1]) <= zeros
    assert equal_bits(before, packed_bits(layer.get_base_layer()))
    merged = model.merge_and_unload(dequantize=True)
    assert int((merged.lin.weight == 0).sum()) >= zeros


def test_a_weight_that_the_format_cannot_hold_is_refused():
    # LLM.int8 quantizes from float16
    model, layer = spp_on("int8")
    layer.spp_B["default"].weight.data.fill_(1e6)
    before = packed_bits(layer.get_base_layer())
    with pytest.raises(ValueError, match="'lin'"):
        model.merge_adapter()
    assert equal_bits(before, packed_bits(layer.get_base_layer()))


def test_bitnet_layers_cannot_be_quantized_again_and_say_so():
    model, layer = spp_on("bitnet")
    with pytest.raises(ValueError, match=r"'lin'.*BitLinear.*dequantize=True"):
        model.merge_adapter()
    assert not layer.merged


def test_unmerge_twice_warns():
    model, layer = spp_on("nf4")
    model.merge_adapter()
    layer.unmerge()
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def test_an_adapter_that_is_not_in_a_layer_merges_nothing():
    model, layer = spp_on("nf4")
    model.add_adapter("other", SPPConfig(r=2, target_modules=["lin"]))
    layer.delete_adapter("other")
    before = packed_bits(layer.get_base_layer())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.merge(adapter_names=["other"])
    assert equal_bits(before, packed_bits(layer.get_base_layer()))
