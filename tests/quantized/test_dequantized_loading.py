# SPDX-License-Identifier: Apache-2.0
"""Layers that cannot be adapted as they are loaded: the error says how to load plain ones, and those are adapted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config

from peft_spp import SPPConfig
from peft_spp.pruning import prune_magnitude
from peft_spp.tuner import Linear

from helpers.quantized_cases import OneLayer, pruned_llama


def refusal(layer: nn.Module) -> str:
    model = OneLayer(layer)
    with pytest.raises(ValueError, match="lin") as error:
        get_peft_model(model, SPPConfig(r=2, target_modules=["lin"]))
    assert model.lin is layer
    return str(error.value)


def fp8_layer() -> nn.Module:
    layer = pytest.importorskip("transformers.integrations.finegrained_fp8").FP8Linear(64, 64, block_size=(32, 32))
    layer.weight.data.copy_(torch.randn(64, 64))
    nn.init.ones_(layer.weight_scale_inv)
    return layer


def gguf_layer() -> nn.Module:
    return pytest.importorskip("transformers.integrations.gguf.utils").GgufLinear(64, 64, ggml_type=8)


def kernel_is_missing(*_: object, **__: object) -> None:
    raise RuntimeError("no kernel for this device")


@pytest.mark.parametrize(
    ("make", "config"), [(fp8_layer, "FineGrainedFP8Config"), (gguf_layer, "GgufConfig")], ids=["fp8", "gguf"]
)
def test_a_layer_whose_kernel_is_missing_says_how_to_load_it_dequantized(make, config, monkeypatch):
    layer = make()
    monkeypatch.setattr(type(layer), "forward", kernel_is_missing)
    message = refusal(layer)
    assert f"quantization_config={config}(dequantize=True)" in message
    assert type(layer).__name__ in message and "RuntimeError" in message and "no kernel for this device" in message


def test_a_layer_of_another_package_says_what_its_call_raised(monkeypatch):
    layer = pytest.importorskip("transformers.integrations.bitnet").BitLinear(64, 64, bias=False)
    monkeypatch.setattr(type(layer), "forward", kernel_is_missing)
    message = refusal(layer)
    assert "RuntimeError" in message and "BitLinear" in message and "dequantize" not in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, None])
def test_weights_that_compressed_tensors_has_packed_are_refused_by_name(dtype):
    """It leaves `nn.Linear` with its own forward pass, and the weight in another dtype or under another name."""
    layer = nn.Linear(64, 64)
    layer.quantization_scheme = object()
    layer.forward = kernel_is_missing
    if dtype is None:
        del layer.weight
        layer.register_parameter("weight_packed", nn.Parameter(torch.ones(64, 8, dtype=torch.int32), False))
    else:
        layer.weight = nn.Parameter(torch.ones(64, 64).to(dtype), requires_grad=False)
    message = refusal(layer)
    assert "CompressedTensorsConfig(" in message and "register_backend" in message
    with pytest.raises(ValueError, match=r"lin is .*: prune before quantizing"):
        prune_magnitude(OneLayer(layer), pattern="2:4", target_modules=["lin"])


def compressed_checkpoint(folder: Path, form: str) -> Path:
    """A pruned model, quantized by compressed-tensors."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    bits, kind = (4, "int") if form == "pack-quantized" else (8, "float" if form == "float-quantized" else "int")
    largest = 448.0 if kind == "float" else 2.0 ** (bits - 1) - 1
    weights = QuantizationArgs(num_bits=bits, type=kind, strategy="channel", symmetric=True)
    groups = {"all": QuantizationScheme(targets=["Linear"], weights=weights)}
    model = pruned_llama()
    config = QuantizationConfig(
        config_groups=groups, ignore=["lm_head"], format=form, quantization_status="compressed"
    )
    apply_quantization_config(model, config, run_compressed=False)
    for layer in model.modules():
        if hasattr(layer, "weight_scale"):
            layer.weight_scale.data.copy_(layer.weight.abs().amax(1, keepdim=True) / largest)
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format=form)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return folder


@pytest.mark.parametrize("form", ["int-quantized", "float-quantized", "pack-quantized"])
def test_models_of_compressed_tensors_are_adapted_when_loaded_dequantized(form: str, tmp_path: Path) -> None:
    folder = compressed_checkpoint(tmp_path / "model", form)
    with pytest.raises(ValueError, match=r"CompressedTensorsConfig\("):
        get_peft_model(AutoModelForCausalLM.from_pretrained(folder), SPPConfig(r=4))
    adapt_dequantized(folder, CompressedTensorsConfig(dequantize=True))


def test_models_in_float8_are_adapted_when_loaded_dequantized(tmp_path: Path) -> None:
    pruned_llama().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, weight in list(tensors.items()):
        if "proj" in name:
            scale = weight.abs().max() / 448
            tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
            blocks = [-(-size // 64) for size in weight.shape]
            tensors[name.replace("weight", "weight_scale_inv")] = scale.expand(blocks).contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [64, 64],
        "modules_to_not_convert": ["lm_head"],
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    adapt_dequantized(tmp_path, FineGrainedFP8Config(dequantize=True))


def adapt_dequantized(folder: Path, config: object) -> None:
    """Load a model, and train and merge an adapter of it: every layer is a plain one, and keeps its zeros."""
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    zeros = {name: weight == 0 for name, weight in model.state_dict().items() if "proj" in name}
    assert len(zeros) == 14 and all(0.4 < zero.float().mean() < 0.6 for zero in zeros.values())
    adapted = get_peft_model(model, SPPConfig(r=4, init_weights=False))
    layers = [layer for layer in adapted.modules() if isinstance(layer, Linear)]
    assert len(layers) == 14 and all(type(layer.get_base_layer()) is nn.Linear for layer in layers)
    tokens = torch.arange(8)[None]
    adapted(input_ids=tokens, labels=tokens).loss.backward()
    assert all(layer.spp_A["default"].weight.grad.abs().sum() > 0 for layer in layers)
    merged = adapted.merge_and_unload().state_dict()
    assert all((merged[name][zero] == 0).all() for name, zero in zeros.items())
