# SPDX-License-Identifier: Apache-2.0
"""Where PyTorch's default device is another one than that of the tensors: results are on that of the tensors."""

import pytest
import torch

from peft_spp.functional import Factors, merged_weight, scaled_weight, spp_linear
from peft_spp.functional.combine import rank_one_blocks
from peft_spp.functional.kernels import by_activation
from peft_spp.functional.kernels.scaled import ScaledWeight
from peft_spp.functional.row_blocks import refine_row_blocks
from peft_spp.sparsity import mask_record

from helpers.factored import make


def factored(m, n, ranks, dtype=torch.float32):
    W, bias, factors = make(m, n, ranks, dtype)
    return W.detach(), bias, factors


def passes_of_the_layer(dtype, tokens=5):
    W, bias, factors = factored(64, 32, [4, 6], dtype)
    x = torch.randn(tokens, 32, dtype=dtype, generator=torch.Generator().manual_seed(0), device="cpu").requires_grad_()

    def run():
        y = spp_linear(x, W, bias, factors)
        return [y, *torch.autograd.grad(y.sum(), [x, bias, *(t for f in factors for t in f[:2])])]

    return run


def passes_of_the_weight(dtype):
    W, _, factors = factored(61, 32, [4, 6], dtype)

    def run():
        weight = scaled_weight(W, factors)
        grads = torch.autograd.grad(weight.sum(), [t for f in factors for t in f[:2]])
        return [weight, merged_weight(W, factors), *grads]

    return run


def products_by_activation(identity):
    W, bias, factors = factored(61, 32, [4, 6])
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0), device="cpu")

    def run():
        with torch.no_grad():
            return [by_activation.linear(x, ScaledWeight(W, factors, identity, torch.float32), bias)]

    return run


def sums_of_adapters(layers):
    _, _, factors = factored(64, 32, [4, 8])
    factors = [Factors(A.detach(), B.detach(), s) for A, B, s in factors]

    def run():
        return [*rank_one_blocks(factors, 4, layers)[:2], refine_row_blocks(factors[0].A, 64 // layers, 16, layers)]

    return run


def record_of_the_mask(weight, compiled):
    def run():
        with pytest.MonkeyPatch.context() as patch:
            if not compiled:
                patch.setattr(mask_record, "mask_sums", lambda *_: None)
            return mask_record.record_mask(weight)

    return run


SPARSE = torch.randn(70, 130, generator=torch.Generator().manual_seed(0)).relu()
CASES = {
    "layer": passes_of_the_layer(torch.float32),
    "layer in float64": passes_of_the_layer(torch.float64),
    "weight": passes_of_the_weight(torch.float32),
    "weight in float64": passes_of_the_weight(torch.float64),
    "by activation": products_by_activation(True),
    "by activation, without the 1": products_by_activation(False),
    "sums": sums_of_adapters(1),
    "sums of stacks": sums_of_adapters(2),
    "mask": record_of_the_mask(SPARSE, True),
    "mask by columns": record_of_the_mask(SPARSE.T, True),
    "mask, not compiled": record_of_the_mask(SPARSE, False),
    "mask by columns, not compiled": record_of_the_mask(SPARSE.T, False),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_default_device_changes_nothing(case):
    expected = case()
    with torch.device("meta"):
        found = case()
    if isinstance(expected, list):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    else:
        assert found == expected
