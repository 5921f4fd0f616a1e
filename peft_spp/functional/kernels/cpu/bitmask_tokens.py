# SPDX-License-Identifier: Apache-2.0
"""y = x W'ᵀ of a compressed weight on the CPU: `bitmask_tokens.h` and `bitmask_prompts.h`, through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...bitmask import WORD, Compressed, bitmask_bytes
from ...factors import Factors
from .bitmask import float_factors, supports
from .bitmask_calls import LINE, Tokens, function_of, prompt_bytes, scratch, tier, weight_of
from .native import make_adapters


MOST_TOKENS = 8
"""`few_tokens` takes so many: with more, expanding the weight costs less than these kernels lose to a matmul's."""


def few_tokens(
    x: Tensor,
    compressed: Compressed,
    bias: Tensor | None,
    factors: Sequence[Factors],
    identity: bool,
    dtype: torch.dtype,
) -> Tensor | None:
    """
    `x @ W'.T + bias` for few tokens, straight from the compressed weight, with float32 sums that are rounded once.

    With an adapter, for the rows of block k, `y = W_k x + s B_k ⊙ (W_k (A_k ⊙ x))`: both products come from the same
    pass, and each further adapter takes another one. A ⊙ x is rounded to the dtype first, as in `by_activation`.
    bfloat16 denormals count as zero where the processor multiplies bfloat16 itself.

    Args:
        x (`torch.Tensor`): shape `(tokens, n)`.
        compressed ([`Compressed`]): W, shape `(m, n)`.
        bias (`torch.Tensor`, *optional*): shape `(m,)`.
        factors (`Sequence[Factors]`): The factors of each adapter; may be empty.
        identity (`bool`): Whether W itself is part of W'.
        dtype (`torch.dtype`): The dtype of the result.

    Returns:
        `torch.Tensor` or `None`: shape `(tokens, m)`. `None` if there are more than `MOST_TOKENS` tokens, the weight
        has another dtype, or nothing is compiled.

    Raises:
        ValueError: If x or the bias do not fit, or there is nothing to multiply with.
    """
    count, n = x.shape
    m = compressed.bitmask.shape[0]
    if n != compressed.columns or (bias is not None and bias.shape != (m,)):
        raise ValueError(
            f"few_tokens: x of shape {tuple(x.shape)} and a bias of shape "
            f"{None if bias is None else tuple(bias.shape)} do not fit a weight of shape {tuple(compressed.shape)}"
        )
    if not factors and not identity:
        raise ValueError("few_tokens: without factors W' is W itself, so identity must be True")
    if count > MOST_TOKENS or compressed.values.dtype != dtype or not supports(compressed, factors, dtype):
        return None
    # with the weights of a model in between, nothing of this is in a cache: each call that is not made saves 10 µs
    if x.dtype != dtype:
        x = x.to(dtype)
    if x.stride(1) != 1:
        x = x.contiguous()
    if bias is not None:
        bias = bias.to(dtype).contiguous()
    y = torch.empty(count, m, dtype=dtype, device="cpu")
    threads = torch.get_num_threads()
    sums_size = -(-MOST_TOKENS * m * 4 // LINE) * LINE
    buffer = scratch(sums_size + 2 * threads * MOST_TOKENS * bitmask_bytes(n) * 8 * 4)
    weight = ctypes.byref(weight_of(compressed))
    tokens = Tokens(x.data_ptr(), x.stride(0), count, None, None, 0, buffer + sums_size, None, y.data_ptr(), buffer)
    tokens.threads, tokens.identity, tokens.first = threads, identity, True
    if bias is not None:
        tokens.bias = bias.data_ptr()
    multiply = function_of("multiply", dtype)
    if not factors:
        tokens.last = True
        multiply(weight, ctypes.byref(tokens))
    for index, (A, B) in enumerate(float_factors(factors), 1):
        tokens.A, tokens.B, tokens.r, tokens.last = A.data_ptr(), B.data_ptr(), len(A), index == len(factors)
        multiply(weight, ctypes.byref(tokens))
        tokens.identity = tokens.first = False
    return y


def supports_prompt(compressed: Compressed, factors: Sequence[Factors], dtype: torch.dtype) -> bool:
    """
    Whether `prompt` runs here: in bfloat16, with AVX-512's instructions for it. AMX multiplies faster than those, in
    PyTorch's matmul.
    """
    return (
        compressed.values.dtype == dtype == torch.bfloat16
        and supports(compressed, factors, dtype)
        and tier() == "avx512"
        and not torch.cpu._is_amx_tile_supported()
    )


def prompt(
    x: Tensor,
    compressed: Compressed,
    bias: Tensor | None,
    factors: Sequence[Factors],
    identity: bool,
) -> Tensor:
    """
    `x @ W'.T + bias` in bfloat16 for the tokens of a prompt. W' is made a few rows at a time, in the cache that they
    are multiplied from; the sums are in float32, and rounded once. Denormals count as zero, as in oneDNN's matmul.

    Args:
        x (`torch.Tensor`): shape `(tokens, n)`, bfloat16.
        compressed ([`Compressed`]): W, shape `(m, n)`, which `supports_prompt`.
        bias (`torch.Tensor`, *optional*): shape `(m,)`.
        factors (`Sequence[Factors]`): The factors of each adapter; may be empty.
        identity (`bool`): Whether W itself is part of W'.

    Returns:
        `torch.Tensor`: shape `(tokens, m)`, bfloat16.
    """
    if x.stride(1) != 1:
        x = x.contiguous()
    if compressed.columns % WORD:
        x = F.pad(x, (0, -compressed.columns % WORD))
    bias = None if bias is None else bias.to(torch.bfloat16).contiguous()
    y = x.new_empty(len(x), compressed.bitmask.shape[0])
    threads = torch.get_num_threads()
    buffer = scratch(threads * prompt_bytes(compressed.columns))
    tokens = Tokens(x.data_ptr(), x.stride(0), len(x), None, None, 0, buffer, None, y.data_ptr(), None)
    tokens.threads, tokens.identity = threads, identity
    if bias is not None:
        tokens.bias = bias.data_ptr()
    adapters = make_adapters(scaled := float_factors(factors))
    function_of("prompt", torch.bfloat16)(
        ctypes.byref(weight_of(compressed)), ctypes.byref(tokens), adapters, ctypes.c_int64(len(scaled))
    )
    return y
