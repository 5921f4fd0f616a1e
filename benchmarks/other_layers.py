# SPDX-License-Identifier: Apache-2.0
"""
A linear layer as other libraries run it on a CPU, from the same dense weight: bitsandbytes and OpenVINO.

Those of 8 and 4 bits round the weights, which compressed weights do not. A library that is not installed has no layer.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor


Layer = Callable[[], object]
"""Computes the layer's output for the x that it was made for."""

LABELS = {
    "bitsandbytes 8 bit": "bitsandbytes, 8 bit (rounds)",
    "bitsandbytes 4 bit": "bitsandbytes, NF4 (rounds)",
    "openvino 16 bit": "OpenVINO, bfloat16",
    "openvino 8 bit": "OpenVINO, int8 weights (rounds)",
}


def other_layers(weights: list[Tensor], x: Tensor) -> dict[str, list[Layer]]:
    """
    The layers of all weights by library.

    Args:
        weights (`list[torch.Tensor]`): bfloat16, each of shape `(m, n)`.
        x (`torch.Tensor`): bfloat16, shape `(tokens, n)`.
    """
    makers: dict[str, Callable[[Tensor, Tensor], Layer]] = {}
    if find_spec("bitsandbytes"):
        makers |= {"bitsandbytes 8 bit": bitsandbytes_8_bit, "bitsandbytes 4 bit": bitsandbytes_4_bit}
    if find_spec("openvino"):
        makers |= {"openvino 16 bit": openvino_16_bit, "openvino 8 bit": openvino_8_bit}
    return {name: [make(weight, x) for weight in weights] for name, make in makers.items()}


def bitsandbytes_8_bit(weight: Tensor, x: Tensor) -> Layer:
    """LLM.int8()."""
    import bitsandbytes as bnb

    m, n = weight.shape
    layer = bnb.nn.Linear8bitLt(n, m, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    # to a device is what quantizes
    layer = layer.to("cpu")
    return lambda: layer(x)


def bitsandbytes_4_bit(weight: Tensor, x: Tensor) -> Layer:
    """NF4, computed in bfloat16."""
    import bitsandbytes as bnb

    m, n = weight.shape
    layer = bnb.nn.Linear4bit(n, m, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
    layer = layer.to("cpu")
    return lambda: layer(x)


def openvino_16_bit(weight: Tensor, x: Tensor) -> Layer:
    """A matrix product with a bfloat16 constant."""
    import openvino
    from openvino import opset14 as ops

    bits = weight.view(torch.int16).numpy().view("uint16")
    constant = ops.constant(openvino.Tensor(bits, list(weight.shape), openvino.Type.bf16))
    return _openvino(ops.convert(constant, openvino.Type.f32), x)


def openvino_8_bit(weight: Tensor, x: Tensor) -> Layer:
    """A matrix product with an int8 constant and a scale a row, as weight compression makes of it."""
    import openvino
    from openvino import opset14 as ops

    scale = weight.float().abs().amax(dim=1, keepdim=True) / 127
    rounded = (weight.float() / scale).round().to(torch.int8)
    constant = ops.convert(ops.constant(rounded.numpy()), openvino.Type.f32)
    return _openvino(ops.multiply(constant, ops.constant(scale.numpy())), x)


def _openvino(weight: Any, x: Tensor) -> Layer:
    import openvino
    from openvino import opset14 as ops

    given = ops.parameter([-1, x.shape[1]], openvino.Type.f32, "x")
    model = openvino.Model([ops.matmul(given, weight, False, True)], [given])
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "bf16",
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    request.set_input_tensor(openvino.Tensor(x.float().numpy()))

    def run() -> Tensor:
        request.infer()
        return torch.from_numpy(cast(Any, request.get_output_tensor(0).data))

    return run
