# SPDX-License-Identifier: Apache-2.0
"""AutoAWQ's layers, through the backend that asks a layer what it does: `pip install --no-deps autoawq`."""

import pytest
import torch
from peft import get_peft_model

from peft_spp import SPPConfig
from peft_spp.tuner.quantized import QuantizedLinear, dequantized_weight

from helpers import reference
from helpers.quantized_cases import IN, OUT, OneLayer, pruned_linear
from helpers.tiny import randomize


gemm = pytest.importorskip("awq.modules.linear.gemm")
pytestmark = pytest.mark.slow


@pytest.fixture
def layer(monkeypatch):
    """A 2:4 pruned layer in the format of AWQ, with a code for zero."""
    # its Triton kernels need a GPU; without Triton it computes with PyTorch
    monkeypatch.setattr(gemm, "TRITON_AVAILABLE", False)
    linear = pruned_linear(bias=False)
    scales = linear.weight.detach().abs().amax(1, keepdim=True) / 7
    linear.weight.data = (linear.weight.detach() / scales).round() * scales
    scales, zeros = scales.t().contiguous().half(), torch.full((1, OUT), 8.0)
    return gemm.WQLinear_GEMM.from_linear(linear.half(), 4, IN, scales=scales, zeros=zeros), linear.weight == 0


def test_the_adapted_layer_is_the_formula_and_merges_into_a_plain_one_with_its_zeros(layer):
    quantized, pruned = layer
    model = get_peft_model(OneLayer(quantized), SPPConfig(r=5, target_modules=["lin"]))
    randomize(model)
    adapted = model.base_model.model.lin
    assert type(adapted) is QuantizedLinear
    weight, factors = dequantized_weight(adapted.get_base_layer()), adapted.get_factors(["default"])
    assert (weight[pruned] == 0).all() and weight[~pruned].count_nonzero() == (~pruned).sum()
    x = torch.randn(3, IN).half().requires_grad_()
    y, expected = model(x), reference.linear(x, weight, None, factors)
    # twice the rounding of float16: of the weight and of the result
    assert (y.double() - expected.double()).norm() < 2**-10 * expected.double().norm()
    y.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters() if p.requires_grad)
    merged = model.merge_and_unload(dequantize=True).lin
    assert type(merged) is torch.nn.Linear and (merged.weight[pruned] == 0).all()
