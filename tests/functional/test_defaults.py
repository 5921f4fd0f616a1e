# SPDX-License-Identifier: Apache-2.0
"""The default dtype and device of the program are not those of the kernels' own memory."""

import pytest
import torch
from torch import nn

from peft_spp import CompressedLinear
from peft_spp.checkpoints.empty_model import default_dtype
from peft_spp.functional import Factors, compressed_linear, merged_weight, spp_linear
from peft_spp.functional.compressed import compress

from helpers.tiny import prune_


DEFAULTS = [
    lambda: default_dtype(torch.float64),
    lambda: default_dtype(torch.bfloat16),
    lambda: torch.device("meta"),
]


@pytest.mark.parametrize("defaults", DEFAULTS, ids=["float64", "bfloat16", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 64, 600])
@pytest.mark.parametrize("compressed", [False, True])
def test_outputs_and_gradients_do_not_depend_on_the_defaults(compressed, tokens, dtype, defaults):
    torch.manual_seed(0)
    linear = nn.Linear(128, 96, bias=False).to(dtype).requires_grad_(False)
    prune_(linear.weight, "2:4")
    x = torch.randn(tokens, 128, dtype=dtype)
    A, B = torch.randn(8, 128), torch.randn(96, 1)
    target = torch.randn(tokens, 96).to(dtype)

    def run():
        inputs = [one.detach().requires_grad_() for one in (x, A, B)]
        factors = [Factors(inputs[1], inputs[2], 0.5)]
        if compressed:
            y = compressed_linear(inputs[0], compress(linear.weight), None, factors)
        else:
            y = spp_linear(inputs[0], linear.weight, None, factors)
        y.backward(target)
        return [y.detach(), *(one.grad for one in inputs)]

    expected = run()
    with defaults():
        actual = run()
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("defaults", DEFAULTS, ids=["float64", "bfloat16", "meta"])
def test_compressing_and_merging_do_not_depend_on_the_defaults(defaults):
    torch.manual_seed(0)
    linear = nn.Linear(70, 24).requires_grad_(False)
    prune_(linear.weight, "0.5")
    factors = [Factors(torch.randn(4, 70), torch.randn(24, 1), 0.5)]
    expected = merged_weight(linear.weight, factors)
    with defaults():
        layer = CompressedLinear.from_linear(linear)
        assert torch.equal(layer.dequantize(), linear.weight)
        assert torch.equal(merged_weight(linear.weight, factors), expected)
