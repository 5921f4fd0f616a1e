# SPDX-License-Identifier: Apache-2.0
"""What a layer that is built by itself keeps of its adapters, and how it is changed."""

import copy
import math

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_spp import SPPConfig
from peft_spp.tuner.layer import Linear

from helpers import reference


def built(base=None, config=None, r=2, spp_alpha=3.0, **kwargs):
    torch.manual_seed(0)
    base = nn.Linear(6, 8).double() if base is None else base
    return Linear(base, "a", config or SPPConfig(init_weights=False), r, spp_alpha, **kwargs)


def spoil(layer, name):
    with torch.no_grad():
        layer.spp_A[name].weight[0, 0] = math.nan


def test_the_defaults():
    base = nn.Linear(6, 8)
    layer = built(base)
    assert layer.base_layer is base
    assert (layer.r, layer.spp_alpha, layer.scaling) == ({"a": 2}, {"a": 3.0}, {"a": 1.5})
    assert (layer.in_features, layer.out_features) == (6, 8)
    assert layer.active_adapters == ["a"] and layer.disable_adapters is False
    assert layer.merged is False and layer.merged_adapters == []
    assert (layer.fan_in_fan_out, layer.is_target_conv_1d_layer) == (False, False)
    assert (layer.module_name, layer.kwargs, layer.cast_input_dtype_enabled) == ("", {}, True)
    assert (layer.parameter_name, layer.num_experts) == ("weight", 1)


def test_what_it_is_given_is_kept():
    layer = built(Conv1D(8, 6), fan_in_fan_out=True, is_target_conv_1d_layer=True, module_name="h.0", more=1)
    assert (layer.fan_in_fan_out, layer.is_target_conv_1d_layer) == (True, True)
    assert (layer.module_name, layer.kwargs) == ("h.0", {"more": 1})
    assert (layer.in_features, layer.out_features) == (6, 8)
    assert layer.spp_A["a"].weight.shape == (2, 6) and layer.spp_B["a"].weight.shape == (8, 1)


@pytest.mark.parametrize("inference_mode", [False, True])
def test_factors_are_trained_unless_the_adapter_is_for_inference(inference_mode):
    layer = built(config=SPPConfig(inference_mode=inference_mode))
    assert {p.requires_grad for p in (*layer.spp_A.parameters(), *layer.spp_B.parameters())} == {not inference_mode}


def test_factors_have_no_bias_and_the_dtype_of_the_base():
    layer = built(nn.Linear(6, 8).bfloat16())
    for factor in (layer.spp_A["a"], layer.spp_B["a"]):
        assert factor.bias is None and factor.weight.dtype == torch.bfloat16


def test_the_rank_is_at_most_the_number_of_outputs_and_the_scaling_follows():
    layer = built(r=100, spp_alpha=16.0)
    assert (layer.r["a"], layer.spp_alpha["a"], layer.scaling["a"]) == (8, 16.0, 2.0)
    assert built(r=8).r["a"] == 8


def test_scales():
    layer = built(r=2, spp_alpha=3.0)
    layer.update_layer("b", 4, 8.0, SPPConfig())
    layer.update_layer("c", 4, 8.0, SPPConfig())
    layer.set_adapter(["a", "b"])
    layer._active_adapter = ["not here", "a", "b"]  # active in another layer
    layer.scale_layer(4.0)
    assert layer.scaling == {"a": 6.0, "b": 8.0, "c": 2.0}
    layer.unscale_layer(2.0)
    assert layer.scaling == {"a": 3.0, "b": 4.0, "c": 2.0}
    layer.set_scale("b", 5.0)
    layer.set_scale("not here", 5.0)
    assert layer.scaling == {"a": 3.0, "b": 10.0, "c": 2.0}
    layer.unscale_layer()
    assert layer.scaling == {"a": 1.5, "b": 2.0, "c": 2.0}


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_the_delta_has_the_shape_and_dtype_of_the_weight(fan_in_fan_out):
    base = Conv1D(8, 6) if fan_in_fan_out else nn.Linear(6, 8)
    layer = built(base.bfloat16(), fan_in_fan_out=fan_in_fan_out)
    weight = layer.unmerged_weight()
    assert weight.shape == (8, 6) and not weight.requires_grad
    delta = layer.get_delta_weight("a")
    assert delta.shape == base.weight.shape and delta.dtype == torch.bfloat16
    expected = reference.effective_weight(weight.double(), layer.get_factors(["a"]), identity=False)
    delta = delta.t() if fan_in_fan_out else delta
    torch.testing.assert_close(delta.double(), expected, rtol=2**-8, atol=0.0)


def test_unloading_merges_what_is_asked_and_keeps_no_copy():
    layer = built()
    layer.update_layer("b", 4, 8.0, SPPConfig(init_weights=False))
    before = layer.get_base_layer().weight.detach().clone()
    expected = before + layer.get_delta_weight("b")
    assert layer.unload_and_optionally_merge_module(False, False, None) is layer.base_layer
    assert torch.equal(layer.get_base_layer().weight, before) and not layer.merged
    base = layer.unload_and_optionally_merge_module(True, False, ["b"])
    assert base is layer.base_layer and layer.merged_adapters == ["b"]
    torch.testing.assert_close(base.weight.detach(), expected)
    assert layer._unmerged_weight is None


def test_unloading_is_safe_if_asked():
    layer = built()
    before = layer.get_base_layer().weight.detach().clone()
    spoil(layer, "a")
    with pytest.raises(ValueError, match="NaN"):
        layer.unload_and_optionally_merge_module(True, True, None)
    assert torch.equal(layer.get_base_layer().weight, before)
    layer.unload_and_optionally_merge_module(True, False, None)
    assert layer.get_base_layer().weight.isnan().any()


def test_merging_is_not_safe_unless_asked_and_keeps_the_weight_in_host_memory():
    layer = built()
    before = layer.get_base_layer().weight.detach().clone()
    spoil(layer, "a")
    layer.merge()
    assert layer.get_base_layer().weight.isnan().any()
    kept = layer._unmerged_weight
    assert (
        torch.equal(kept, before)
        and kept.device.type == "cpu"
        and kept.data_ptr() != layer.get_base_layer().weight.data_ptr()
    )
    layer.unmerge()
    assert (
        torch.equal(layer.get_base_layer().weight, before)
        and layer._unmerged_weight is None
        and layer.merged_adapters == []
    )


def test_a_weight_that_is_offloaded_is_merged_and_unmerged():
    layer = built()
    x = torch.randn(3, 6, dtype=torch.double)
    unmerged, offloaded = layer(x), cpu_offload(nn.Sequential(copy.deepcopy(layer)), torch.device("cpu"))
    layer.merge()
    offloaded[0].merge()
    assert offloaded[0].get_base_layer().weight.is_meta and torch.equal(offloaded(x), layer(x))
    offloaded[0].unmerge()
    assert offloaded[0].get_base_layer().weight.is_meta and torch.equal(offloaded(x), unmerged)


def test_what_is_merged_already_is_not_merged_again():
    layer = built()
    layer.update_layer("b", 4, 8.0, SPPConfig(init_weights=False))
    layer.merge(adapter_names=["a"])
    once = layer.get_base_layer().weight.detach().clone()
    with pytest.warns(UserWarning):
        layer.merge(adapter_names=["a"])
    layer.merge(adapter_names=["not here"])
    assert torch.equal(layer.get_base_layer().weight, once) and layer.merged_adapters == ["a"]
    layer.merge(adapter_names=["b"])
    assert layer.merged_adapters == ["a", "b"]


def test_a_merged_adapter_is_not_deleted():
    layer = built(module_name="h.0")
    layer.update_layer("b", 4, 8.0, SPPConfig(init_weights=False))
    layer.merge(adapter_names=["a"])
    with pytest.raises(ValueError, match=r"'a'.*h\.0"):
        layer.delete_adapter("a")
    assert set(layer.spp_A) == {"a", "b"}
    layer.delete_adapter("b")
    assert set(layer.spp_A) == {"a"}
    layer.unmerge()
    layer.delete_adapter("a")
    assert not layer.spp_A and not layer.spp_B and not layer.r and not layer.scaling and not layer.spp_alpha


def test_disabled_adapters_unmerge_only_what_is_merged(recwarn):
    layer = built()
    x = torch.randn(3, 6, dtype=torch.double)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert not recwarn  # of nothing to unmerge


def test_a_weight_that_is_not_whole_is_not_merged():
    layer = built(module_name="h.0")
    layer.base_layer.weight.data = layer.base_layer.weight.data.flatten()[:10]
    with pytest.raises(RuntimeError, match=r"h\.0"):
        layer.merge()


def test_no_low_rank_stand_in_is_offered():
    assert built().supports_lora_conversion() is False


def test_a_mixed_batch_comes_in_the_dtype_of_the_base_layer():
    layer = built(nn.Linear(6, 8).bfloat16()).eval()
    layer.spp_A.float(), layer.spp_B.float()
    x = torch.randn(4, 6).bfloat16()
    names = ["a", "__base__", "__base__", "a"]
    mixed = layer(x, adapter_names=names)
    assert mixed.dtype == torch.bfloat16
    assert torch.equal(mixed[1:3], layer.base_layer(x[1:3]))
    assert not torch.equal(mixed[0], layer.base_layer(x)[0])


class Narrowing(nn.Linear):
    """A linear layer whose results are of another dtype than its weight, and which counts its calls."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x).bfloat16()


def test_a_mixed_batch_comes_in_the_dtype_of_the_results_of_the_base_layer():
    layer = built(Narrowing(6, 8)).eval()
    x = torch.randn(4, 6)
    mixed = layer(x, adapter_names=["a", "__base__", "__base__", "a"])
    assert mixed.dtype == torch.bfloat16
    assert torch.equal(mixed[1:3], layer.base_layer(x[1:3]))
    assert torch.equal(mixed[::3], layer(x[::3]).bfloat16())


def test_adapters_that_no_row_of_a_mixed_batch_asks_for_are_not_computed():
    layer = built(Narrowing(6, 8)).eval()
    layer.update_layer("b", 4, 8.0, SPPConfig(init_weights=False))
    layer(torch.randn(4, 6), adapter_names=["b", "__base__", "__base__", "b"])
    assert layer.base_layer.calls == 2  # for all rows, and for those of b


def test_a_scaling_that_is_a_tensor_is_overwritten_in_place():
    layer = built(r=2, spp_alpha=3.0)
    layer.scaling["a"] = tensor = torch.tensor(1.5)
    layer.set_scale("a", 2.0)
    assert layer.scaling["a"] is tensor and tensor.item() == 3.0
    layer.scale_layer(4.0)
    layer.unscale_layer(3.0)
    assert layer.scaling["a"] is tensor and tensor.item() == 4.0
    layer.unscale_layer()
    assert layer.scaling["a"] is tensor and tensor.item() == 1.5


def test_without_any_adapter_the_base_layer_is_called():
    layer = built()
    layer._active_adapter = "not here"
    x = torch.randn(3, 6, dtype=torch.double)
    assert torch.equal(layer(x), layer.base_layer(x))


class Scaling(nn.Linear):
    """A linear layer whose call takes more than its input."""

    def forward(self, x, factor=1.0, *, shift=0.0):
        return super().forward(x) * factor + shift


def hooked(layer):
    calls = []
    layer.get_base_layer().register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_hooks_change_no_bit():
    layer = built(nn.Linear(200, 80))
    x = torch.randn(50, 200)
    expected = layer(x)
    calls = hooked(layer)
    assert torch.equal(layer(x), expected) and calls == [1]


def test_dropout_of_nothing_changes_no_bit():
    layer = built(nn.Linear(200, 80), SPPConfig(init_weights=False, spp_dropout=0.5))
    x = torch.randn(50, 200)
    expected = layer.eval()(x)
    layer.train().spp_dropout["a"].p = 0.0
    assert torch.equal(layer(x), expected)


def test_hooks_run_with_all_that_the_base_layer_takes():
    layer = built(Scaling(6, 8).double())
    x = torch.randn(3, 6, dtype=torch.double)
    expected = layer(x, 2.0, shift=1.0)
    calls = hooked(layer)
    torch.testing.assert_close(layer(x, 2.0, shift=1.0), expected)
    assert calls == [1]


def test_hooks_below_another_tuner_layer_run_and_change_nothing():
    inner = LoraLinear(Scaling(6, 8).double(), "a", LoraConfig(r=2, init_lora_weights=False), r=2, lora_alpha=4)
    layer = built(inner.double())
    x = torch.randn(3, 6, dtype=torch.double)
    update = x @ layer.get_delta_weight("a").T
    expected = inner(x, 2.0, shift=1.0) + update
    torch.testing.assert_close(layer(x, 2.0, shift=1.0), expected)
    calls = hooked(layer)
    torch.testing.assert_close(layer(x, 2.0, shift=1.0), expected)
    assert calls


def test_the_unmerged_weight_has_the_dtype_that_the_layer_has_now():
    layer = built()
    layer.merge()
    layer.to(torch.bfloat16)
    assert layer.unmerged_weight().dtype == layer.get_delta_weight("a").dtype == torch.bfloat16


def test_an_error_of_the_rank_names_it():
    with pytest.raises(ValueError, match=r"\br\b"):
        built(r=0)
