# SPDX-License-Identifier: Apache-2.0
"""The SPP formula in plain Python loops and float64, to compare everything else with."""

from __future__ import annotations

import torch


def block_sizes(rows: int, r: int) -> list[int]:
    """The rows of each block, as evenly as they go, the longer blocks first."""
    return [rows // r + (1 if block < rows % r else 0) for block in range(r)]


def effective_weight(weight, factors, identity=True) -> torch.Tensor:
    """W ⊙ (1 + Σ s · P(A) ⊙ B), element by element as the paper writes it. `weight` is (m, n)."""
    W = weight.detach().double()
    total = torch.full_like(W, 1.0 if identity else 0.0)
    for A, B, s in factors:
        row = 0
        for block, size in enumerate(block_sizes(W.shape[0], A.shape[0])):
            for _ in range(size):
                total[row] += s * A[block].detach().double() * B[row, 0].detach().double()
                row += 1
    return W * total


def linear(x, weight, bias, factors, identity=True) -> torch.Tensor:
    y = x.detach().double() @ effective_weight(weight, factors, identity).T
    return y if bias is None else y + bias.detach().double()


def gradients(x, weight, factors, grad_y) -> dict[str, torch.Tensor | list[torch.Tensor]]:
    """dL/dx, and dL/dA and dL/dB of each adapter, by the chain rule written out."""
    m, n = weight.shape
    g = grad_y.double().reshape(-1, m)
    x2 = x.detach().double().reshape(-1, n)
    S = (g.T @ x2) * weight.detach().double()
    grad_A, grad_B = [], []
    for A, B, s in factors:
        ga, gb = torch.zeros(A.shape, dtype=torch.double), torch.zeros(B.shape, dtype=torch.double)
        row = 0
        for block, size in enumerate(block_sizes(m, A.shape[0])):
            for _ in range(size):
                ga[block] += s * B[row, 0].detach().double() * S[row]
                gb[row, 0] = s * (S[row] * A[block].detach().double()).sum()
                row += 1
        grad_A.append(ga)
        grad_B.append(gb)
    return {"x": (g @ effective_weight(weight, factors)).reshape(x.shape), "A": grad_A, "B": grad_B}
