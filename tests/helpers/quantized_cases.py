# SPDX-License-Identifier: Apache-2.0
"""Quantized layers and models of the real packages."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft_spp.compressed import CompressedLinear

from helpers.tiny import prune_, tiny_llama


IN, OUT = 128, 64
# the formats that have a code for zero, and can be quantized again
EXACT_ZERO = ("nf4", "nf4-double", "fp4", "fp4-double", "int8", "torchao-int8", "torchao-int4")
ALL = (*EXACT_ZERO, "hqq", "bitnet", "bitmask")


class OneLayer(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.lin = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x)


def quantized(kind: str, linear: nn.Linear, compute_dtype: torch.dtype | None = None) -> nn.Module:
    """The layer, quantized by the package that `kind` names."""
    if kind.startswith(("nf4", "fp4")):
        return _bnb_4bit(kind, linear, compute_dtype)
    if kind == "int8":
        return _bnb_8bit(linear)
    if kind == "bitmask":
        return CompressedLinear.from_linear(linear)
    if kind.startswith("torchao"):
        return _torchao(kind, linear)
    if kind == "hqq":
        hqq = pytest.importorskip("hqq.core.quantize")
        config = hqq.BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
        return hqq.HQQLinear(linear, config, compute_dtype=compute_dtype or torch.float32, device="cpu")
    return _bitnet(linear)


def _bnb_4bit(kind: str, linear: nn.Linear, compute_dtype: torch.dtype | None) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    settings = {"quant_type": kind[:3], "compress_statistics": kind.endswith("double")}
    m, n = linear.weight.shape
    layer = bnb.nn.Linear4bit(n, m, bias=linear.bias is not None, compute_dtype=compute_dtype, **settings)
    layer.weight = bnb.nn.Params4bit(linear.weight.detach().clone(), requires_grad=False, module=layer, **settings)
    layer.bias = linear.bias
    return without_cpu_kernel(layer.to("cpu"))


def _bnb_8bit(linear: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    m, n = linear.weight.shape
    layer = bnb.nn.Linear8bitLt(n, m, bias=linear.bias is not None, has_fp16_weights=False, threshold=6.0)
    layer.weight = bnb.nn.Int8Params(linear.weight.detach().clone(), requires_grad=False, has_fp16_weights=False)
    layer.bias = linear.bias
    return layer.to("cpu")


def _torchao(kind: str, linear: nn.Linear) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    from torchao.quantization.granularity import PerGroup

    config = (
        quantization.Int8WeightOnlyConfig()
        if kind == "torchao-int8"
        else quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    )
    model = nn.Sequential(linear)
    quantization.quantize_(model, config)
    return model[0]


def _bitnet(linear: nn.Linear) -> nn.Module:
    from transformers.integrations.bitnet import BitLinear, pack_weights

    m, n = linear.weight.shape
    layer = BitLinear(n, m, linear.bias is not None, dtype=torch.float32)
    layer.weight.copy_(
        pack_weights((linear.weight.detach() / linear.weight.detach().abs().mean()).round().clamp(-1, 1))
    )
    layer.weight_scale.fill_(20.0)
    if linear.bias is not None:
        layer.bias.copy_(linear.bias.detach())
    return layer


def without_cpu_kernel(model: nn.Module) -> nn.Module:
    """
    Keep bitsandbytes from its kernel for CPUs with AVX-512 BF16: at the first call in eval mode it rounds the scales
    to bfloat16 for good, and `state_dict()` does not bring them back. A test would depend on the CPU.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def pruned_linear(seed: int = 0, pattern: str = "2:4", bias: bool = True, dtype: torch.dtype = torch.float32):
    torch.manual_seed(seed)
    linear = nn.Linear(IN, OUT, bias=bias).to(dtype)
    prune_(linear.weight, pattern)
    return linear


def packed_bits(layer: nn.Module) -> list[torch.Tensor]:
    """Copies of all tensors that a quantized layer's weight is made of."""
    if hasattr(layer, "W_q"):
        return [layer.W_q.data.clone(), layer.meta["scale"].clone(), layer.meta["zero"].clone()]
    if not hasattr(layer, "weight"):
        return [buffer.clone() for buffer in layer.buffers()]
    weight = layer.weight
    if isinstance(layer, CompressedLinear):
        return [weight.data.clone(), layer.bitmask.clone()]
    if hasattr(weight, "qdata"):
        return [weight.qdata.clone(), weight.scale.clone()]
    state = getattr(weight, "quant_state", None)
    if state is None:
        maxima = layer.state.SCB if weight.SCB is None else weight.SCB
        return [weight.data.clone(), maxima.clone()]
    tensors = [weight.data, state.absmax, state.code]
    if state.nested:
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    return [tensor.clone() for tensor in tensors]


def equal_bits(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    return len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def pruned_llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny 2:4 Llama whose sizes bitsandbytes' blocks divide."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = tiny_llama(num_hidden_layers=2, **sizes)
    for name, weight in model.named_parameters():
        if ".layers." in name and weight.dim() == 2:
            prune_(weight, "2:4")
    return model.to(dtype)


def quantization_config(kind: str):
    """How Transformers is asked for `kind`."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if kind == "torchao-int8":
        quantization = pytest.importorskip("torchao.quantization")
        return TorchAoConfig(quantization.Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes")
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind[:3],
        bnb_4bit_use_double_quant=kind.endswith("double"),
        bnb_4bit_compute_dtype=torch.float32,
    )


def load_quantized(path, kind: str | None = None) -> nn.Module:
    from transformers import AutoModelForCausalLM

    settings = {} if kind is None else {"quantization_config": quantization_config(kind)}
    return without_cpu_kernel(AutoModelForCausalLM.from_pretrained(path, device_map="cpu", **settings))
