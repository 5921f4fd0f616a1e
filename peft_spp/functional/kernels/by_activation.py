# SPDX-License-Identifier: Apache-2.0
"""The layer by way of its activations, for few tokens: the weight is read as it is, and W' is never made.

For the rows of block k, `y = W_k x + s B_k ⊙ (W_k (A_k ⊙ x))`: two products with the same `W_k`. They are one batched
matmul over the row blocks, with two columns a token, so that W is read once.
"""

from __future__ import annotations

import torch

from ..factors import compute_dtype
from ..row_blocks import row_tiles
from .scaled import ScaledWeight


# How many multiply-adds a matmul does in the time that scaling one element of the weight takes: seconds an element
# times multiply-adds a second. On CPU it was read off the number of tokens where both ways take as long, for weights
# of 768×2048 to 11008×4096 on 2 cores of an EPYC 9004 (AVX-512); float16 is not among the compiled kernels' dtypes.
# For GPUs the figures are an H100's memory bandwidth and matmul rate by its data sheet, not measured:
# 4 bytes / 3.35 TB/s · 400 T/s.
_BALANCE = {("cpu", torch.bfloat16): 30.0, ("cpu", torch.float16): 95.0, ("cuda", torch.float32): 60.0}
_BALANCE_DEFAULT = {"cpu": 45.0, "cuda": 480.0}
# A product of a few columns is bound by reading the weight, and below this many MKL's are several times slower.
_LEAST_COLUMNS = 4
# Below this many elements the calls cost more than the arithmetic, and one product has fewer of them.
_LEAST_ELEMENTS = 1 << 18


def is_cheaper(tokens: int, w: ScaledWeight) -> bool:
    """
    Whether this way costs less than the one by weight, for the forward pass.

    By weight, every element of W is scaled. By activation, each token costs a second column in the matmul (m·n
    multiply-adds, of which the matmul does `balance` while one element is scaled) and a scaled row of length n for
    every row block. So, in units of the time to scale one element, `tokens · (m·n / balance + r·n) < m·n`.
    """
    m, n = w.dense.shape
    if m * n < _LEAST_ELEMENTS:
        return False
    device_type = w.dense.device.type
    balance = _BALANCE.get((device_type, w.dtype), _BALANCE_DEFAULT.get(device_type, _BALANCE_DEFAULT["cuda"]))
    blocks = sum(A.shape[0] for A, _, _ in w.factors)
    return tokens * (m * n * len(w.factors) / balance + blocks * n) < m * n


def linear(x: torch.Tensor, w: ScaledWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """`x @ W'.T + bias` for the `(m, n)` weight, block by block of rows."""
    weight, factors, identity, dtype = w.dense, w.factors, w.identity, w.dtype
    m, n = weight.shape
    x2d = x.reshape(-1, n)
    acc = compute_dtype(x, weight, *(t for A, B, _ in factors for t in (A, B)))
    # not a view of `y`: see `cpu.linear`
    result = torch.empty(*x.shape[:-1], m, dtype=dtype, device=x.device)
    y = result.view(x2d.shape[0], m)
    for index, (A, B, s) in enumerate(factors):
        with_base = identity and index == 0
        for tile in row_tiles(m, A.shape[0]):
            part = _block_products(x2d, weight[tile.rows].to(dtype), A[tile.blocks].to(acc), with_base)
            scaled = part[:, -x2d.shape[0] :] * (B[tile.rows].to(acc) * s).view(part.shape[0], 1, -1)
            if with_base:
                scaled += part[:, : x2d.shape[0]]
                if bias is not None:
                    scaled += bias[tile.rows].view(part.shape[0], 1, -1)
            # (blocks, tokens, rows per block) -> (tokens, rows)
            rows = scaled.transpose(0, 1).reshape(x2d.shape[0], -1)
            y[:, tile.rows] = rows if index == 0 else rows + y[:, tile.rows]
    if bias is not None and not identity:
        y += bias
    return result


def _block_products(x: torch.Tensor, weight: torch.Tensor, A: torch.Tensor, with_base: bool) -> torch.Tensor:
    """`[x; A_k ⊙ x] W_kᵀ` of each block k, or only the second half: shape `(blocks, tokens or twice that, rows)`."""
    blocks, n = A.shape
    tokens = x.shape[0]
    columns = tokens * (2 if with_base else 1)
    X = torch.zeros(blocks, max(columns, _LEAST_COLUMNS), n, dtype=weight.dtype, device=x.device)
    if with_base:
        X[:, :tokens] = x
    torch.mul(A.unsqueeze(1), x, out=X[:, columns - tokens : columns])
    products = torch.bmm(X, weight.unflatten(0, (blocks, -1)).transpose(1, 2))
    return products[:, :columns]
