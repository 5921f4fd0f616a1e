# SPDX-License-Identifier: Apache-2.0
"""A pruned weight with factors, for tests of the math."""

import torch

from peft_spp.functional import Factors


def make(m, n, ranks, dtype=torch.double, factor_dtype=None, fan_in_fan_out=False, bias=True, seed=0):
    torch.manual_seed(seed)
    W = torch.randn(m, n, dtype=torch.double)
    W[torch.rand(m, n) < 0.5] = 0.0
    W = (W.T.contiguous() if fan_in_fan_out else W).to(dtype).requires_grad_()
    factors = [
        Factors(
            torch.randn(r, n).to(factor_dtype or dtype).requires_grad_(),
            torch.randn(m, 1).to(factor_dtype or dtype).requires_grad_(),
            0.5 + i,
        )
        for i, r in enumerate(ranks)
    ]
    return W, torch.randn(m).to(dtype).requires_grad_() if bias else None, factors


def relative_error(actual, expected):
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()
