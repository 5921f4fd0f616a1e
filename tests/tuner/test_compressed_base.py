# SPDX-License-Identifier: Apache-2.0
"""SPP on compressed weights is SPP on the dense ones."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from peft_spp import SPPConfig, hotswap_adapter
from peft_spp.compressed import CompressedLinear
from peft_spp.functional.bitmask import decompress

from helpers.tiny import block_linears, prune_, randomize, tiny_llama


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
TOKENS = torch.arange(24).view(2, 12)


def compressed(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for name in block_linears(model):
        model.set_submodule(name, CompressedLinear.from_linear(model.get_submodule(name)))
    return model


def pruned_llama(dtype=torch.float32) -> nn.Module:
    model = tiny_llama(num_hidden_layers=2).to(dtype)
    for name in block_linears(model):
        prune_(model.get_submodule(name).weight, "2:4")
    return model


def both(dtype=torch.float32, adapters=("default",), **settings):
    """The dense model and the compressed one, with the same adapters."""
    models = []
    base = pruned_llama(dtype)
    for each in (base, compressed(base)):
        torch.manual_seed(3)
        model = get_peft_model(each, SPPConfig(**{"r": 4, "task_type": "CAUSAL_LM", **settings}))
        for name in adapters[1:]:
            model.add_adapter(name, SPPConfig(**{"r": 2, "task_type": "CAUSAL_LM", **settings}))
        torch.manual_seed(4)
        randomize(model)
        models.append(model)
    return models


def weights(model):
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {
        name: decompress(layer.compressed) if isinstance(layer, CompressedLinear) else layer.weight.detach()
        for name, layer in block_linears(base).items()
    }


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k].view(torch.uint8), b[k].view(torch.uint8)) for k in a)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("adapters", [("default",), ("default", "second")])
def test_outputs_and_gradients_are_those_of_the_dense_model(dtype, adapters):
    dense, small = both(dtype, adapters)
    results = []
    for model in (dense, small):
        model.base_model.set_adapter(list(adapters))
        output = model.train()(input_ids=TOKENS, labels=TOKENS)
        output.loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        results.append((output.logits, output.loss, grads))
    bounds = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(results[0][0], results[1][0], **bounds)
    torch.testing.assert_close(results[0][1], results[1][1], **bounds)
    assert results[0][2].keys() == results[1][2].keys() and results[0][2]
    for name, expected in results[0][2].items():
        scale = expected.abs().max().clamp_min(1e-6)
        torch.testing.assert_close(results[1][2][name] / scale, expected / scale, rtol=0, atol=4 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_a_merge_and_an_unmerge_give_the_bits_of_the_dense_model(dtype):
    dense, small = both(dtype, ("default", "second"))
    before = weights(small)
    for names in (["default"], ["second"]):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Merge spp module")  # nothing is rounded
            dense.merge_adapter(names)
            small.merge_adapter(names)
        assert same_bits(weights(dense), weights(small)) and not same_bits(before, weights(small))
    small.unmerge_adapter()
    assert same_bits(before, weights(small))


def test_merging_for_good_rewrites_values_and_keeps_the_layer():
    dense, small = both()
    layers = block_linears(small.get_base_model())
    bitmasks = {name: layer.bitmask for name, layer in layers.items()}
    merged = small.merge_and_unload(safe_merge=True)
    assert same_bits(weights(merged), weights(dense.merge_and_unload()))
    after = block_linears(merged)
    assert all(after[name] is layer and layer.bitmask is bitmasks[name] for name, layer in layers.items())
    torch.testing.assert_close(merged(TOKENS).logits, dense.get_base_model()(TOKENS).logits)


def test_a_broken_adapter_is_refused_by_a_safe_merge_and_changes_nothing():
    _, small = both()
    before = weights(small)
    layer = small.get_base_model().model.layers[1].mlp.down_proj
    layer.spp_B["default"].weight.data[3] = float("inf")
    for merge in (small.merge_adapter, small.merge_and_unload):
        with pytest.raises(ValueError, match=r"NaNs detected.*layers\.1\.mlp\.down_proj"):
            merge(safe_merge=True)
        assert same_bits(before, weights(small))
    # without the check, zeros are kept all the same
    small.merge_adapter()
    assert all((w[before[name] == 0] == 0).all() for name, w in weights(small).items())


def test_a_dense_model_out_of_a_compressed_one():
    dense, small = both()
    merged = small.merge_and_unload(dequantize=True)
    assert not any(isinstance(module, CompressedLinear) for module in merged.modules())
    assert same_bits(weights(merged), weights(dense.merge_and_unload()))


def test_an_adapter_of_the_one_loads_on_the_other(tmp_path):
    dense, small = both()
    for number, (trained, other) in enumerate([(dense, small), (small, dense)]):
        trained.save_pretrained(tmp_path / str(number))
        base = pruned_llama()
        base = compressed(base) if other is small else base
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # the masks are the same, and nothing is quantized
            loaded = PeftModel.from_pretrained(base, tmp_path / str(number), check_base="error")
        torch.testing.assert_close(loaded(TOKENS).logits, trained.eval()(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_a_base_with_other_zeros_is_noticed(tmp_path):
    _, small = both()
    small.save_pretrained(tmp_path)
    base = pruned_llama()
    weight = base.model.layers[0].self_attn.q_proj.weight
    weight.data = weight.data.roll(1, dims=1)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj"):
        PeftModel.from_pretrained(compressed(base), tmp_path, check_base="error")


def test_mixed_batches_dropout_scales_and_disabled_adapters():
    dense, small = both(adapters=("default", "second"), spp_dropout=0.5)
    outputs = []
    for model in (dense, small):
        model.eval()
        mixed = model(TOKENS, adapter_names=["second", "__base__"]).logits
        with model.disable_adapter():
            base = model(TOKENS).logits
        for layer in model.modules():
            if hasattr(layer, "set_scale"):
                layer.set_scale("default", 0.3)
        scaled = model(TOKENS).logits
        model.train()
        torch.manual_seed(7)
        dropped = model(TOKENS).logits
        model.set_weighted_adapters(["default", "second"], [0.25, -1.0])
        outputs.append([mixed, base, scaled, dropped, model.eval()(TOKENS).logits])
    for expected, actual in zip(*outputs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs[1][0][1], outputs[1][1][1])


def test_hotswapping(tmp_path):
    dense, small = both()
    dense.save_pretrained(tmp_path)
    randomize(small)
    hotswap_adapter(small, tmp_path, "default")
    torch.testing.assert_close(small.eval()(TOKENS).logits, dense.eval()(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_only_the_values_the_factors_and_the_inputs_are_kept_for_the_backward_pass():
    layer = CompressedLinear.from_linear(block_linears(pruned_llama())["model.layers.0.mlp.up_proj"])
    model = get_peft_model(nn.Sequential(layer), SPPConfig(r=4, target_modules=["0"]))
    own = {t.data_ptr() for t in (layer.weight, layer.bitmask, layer.row_offsets)}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(torch.randn(3, layer.in_features, requires_grad=True))
    assert max(t.numel() for t in kept if t.data_ptr() not in own) == 4 * layer.in_features


def test_autocast_and_second_derivatives():
    dense, small = both()
    x = torch.randn(2, 5, 32)
    names = "base_model.model.model.layers.0.mlp.gate_proj"
    layers = [model.get_submodule(names) for model in (dense, small)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(layers[1](x), layers[0](x))
    seconds = []
    for layer in layers:
        each = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(layer(each).square().sum(), each, create_graph=True)
        seconds.append(torch.autograd.grad(grad.square().sum(), [each, layer.spp_B["default"].weight]))
    torch.testing.assert_close(seconds[1], seconds[0], rtol=1e-4, atol=1e-4)


def test_a_wrong_dtype_or_shape_is_an_error_as_on_a_linear_layer():
    layer = CompressedLinear.from_linear(nn.Linear(8, 4))
    with pytest.raises(RuntimeError, match="same dtype"):
        layer(torch.zeros(2, 8, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"cannot be multiplied \(6x7 and 8x4\)"):
        layer(torch.zeros(2, 3, 7))


def test_lora_trains_on_it_and_its_merge_is_refused_with_the_weight_unchanged():
    base = compressed(pruned_llama())
    before = weights(base)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)
    with pytest.raises(ValueError, match=r"cannot merge the adapter of model\.layers\.0\.self_attn\.q_proj"):
        model.merge_and_unload()
    assert same_bits(before, weights(model))
