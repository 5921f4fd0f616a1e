# SPDX-License-Identifier: Apache-2.0
"""The CPU backend: W' and gyᵀx are made and used chunk by chunk, and never exist as a whole.

A fresh m×n tensor costs more in page faults than the arithmetic on it (11008×4096 in float32: 87 ms to fill a new one,
17 ms to fill one that is there), and one that leaves the caches is read back from main memory. So the weight is
walked in chunks, each used by a matmul right after it is made.

The forward pass walks chunks of rows, since a row of W' makes a column of the output. The gradient of x walks chunks
of columns for the same reason: it needs no sum over chunks. Either keeps the matmuls at the speed of whole ones.

What is done to the elements of a chunk is in `native` (C++, compiled on first use) and in `tiled` (PyTorch's own
operations, for every other dtype and wherever there is no compiler).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import torch
import torch.nn.functional as F

from ...bitmask import WORD, Compressed
from ...factors import Factors
from ..backend import KernelBackend
from ..scaled import ScaledWeight
from . import bitmask, bitmask_tokens
from .elementwise import Elementwise
from .native import NativeElementwise
from .tiled import TiledElementwise


CHUNK_ELEMENTS = 1 << 23

# Without an adapter, tokens in groups read the compressed values again for each group, and still cost less than
# expanding the weight for all of them, up to this many tokens times the share of values that is stored. Read off
# 4096×4096 and 11008×4096 at 50 % and 75 % on 2 cores of an EPYC 9004 (AVX-512); with an adapter a second group costs
# more than it saves. AMX multiplies bfloat16 too fast for that: 16 tokens took 1.5 times F.linear's time by expanding,
# and 2.0 in groups (4096×4096, 75 %, 2 cores of a Xeon with AMX).
_GROUPED_TOKENS = {torch.float32: 48.0}
_GROUPED_TOKENS_DEFAULT = 24.0

# Where `prompt` runs, it is faster than more than two groups, or than more than one of 4 with an adapter, and than
# chunks: 128 tokens of 4096×4096 and 14336×4096 at 50 % took 0.97 to 1.06 of F.linear's time, and 1.19 to 1.23 in
# chunks (2 cores of an EPYC 9004). From 512 tokens on, as in training, y has the bits of the dense layer's instead.
_PROMPT_TOKENS = range(17, 512)
_PROMPT_TOKENS_WITH_ADAPTER = range(5, 512)

# oneDNN writes 16-bit results slowly into columns of a larger matrix: up to this many tokens it is faster to copy them
# there. 128 tokens, 4096×4096 at 50 % and 75 %, in F.linear's time: 1.20 and 1.20 in place and 1.16 and 1.08 copied
# with AMX; 1.11 and 1.08 in place and 1.08 and 1.05 copied with AVX-512 BF16 alone.
_COPIED_TOKENS = 256


class Cpu(KernelBackend):
    """Chunks of the weight, each used right after it is made."""

    def scaled_weight(self, w: ScaledWeight, out: torch.Tensor | None = None) -> torch.Tensor:
        weight = w.dense
        out = torch.empty_like(weight, dtype=w.dtype) if out is None else out
        work = _elementwise(w, out)
        work.write_scaled(out, slice(0, weight.shape[0]), slice(0, weight.shape[1]), w.identity)
        return out

    def compressed_weight(self, w: ScaledWeight, out: torch.Tensor | None = None) -> torch.Tensor:
        out = torch.empty(w.weight.shape, dtype=w.dtype, device="cpu") if out is None else out
        if not _has_kernels(w) or out.stride(1) != 1:
            return super().compressed_weight(w, out)
        work = _elementwise(w)
        work.write_scaled(out, slice(0, out.shape[0]), slice(0, out.shape[1]), w.identity)
        return out

    def compressed_linear(self, x: torch.Tensor, w: ScaledWeight, bias: torch.Tensor | None) -> torch.Tensor:
        assert isinstance(w.weight, Compressed)
        x2d = x.reshape(-1, x.shape[-1])
        tokens = x2d.shape[0]
        settings = (w.weight, bias, w.factors, w.identity)

        def multiply(part: torch.Tensor) -> torch.Tensor | None:
            return bitmask_tokens.few_tokens(part, *settings, w.dtype)

        if _is_prompt(tokens, w):
            return _in_shape_of(x, bitmask_tokens.prompt(x2d.to(w.dtype), *settings))
        if 0 < tokens <= bitmask_tokens.MOST_TOKENS:
            y = multiply(x2d)
            if y is not None:
                return _in_shape_of(x, y)
        if not _has_kernels(w):
            return super().compressed_linear(x, w, bias)
        if not _takes_groups(tokens, w):
            return self.linear_by_weight(x, w, bias)
        groups = [multiply(part) for part in x2d.split(bitmask_tokens.MOST_TOKENS)]
        return _in_shape_of(x, torch.cat(groups))  # type: ignore[arg-type]

    def linear_by_weight(
        self, x: torch.Tensor, w: ScaledWeight, bias: torch.Tensor | None, overwrite: bool = False
    ) -> torch.Tensor:
        if not _has_kernels(w):
            return super().linear_by_weight(x, w, bias, overwrite)
        m, n = w.weight.shape
        dtype = w.dtype
        x2d = x.reshape(-1, n).to(dtype)
        # not a view: see `KernelBackend.linear_by_weight`
        result = torch.empty(*x.shape[:-1], m, dtype=dtype, device="cpu")
        y = result.view(x2d.shape[0], m)
        work = _elementwise(w)
        copies = dtype.itemsize == 2 and x2d.shape[0] <= _COPIED_TOKENS
        for rows, chunk in _scaled_chunks(work, w, by_rows=True):
            if copies:
                y[:, rows] = F.linear(x2d, chunk, None if bias is None else bias[rows].to(dtype))
            elif bias is None:
                torch.mm(x2d, chunk.t(), out=y[:, rows])
            else:
                torch.addmm(bias[rows].to(dtype), x2d, chunk.t(), out=y[:, rows])
        return result

    def linear_backward(
        self,
        grad_y: torch.Tensor,
        x: torch.Tensor,
        w: ScaledWeight,
        needs_x: bool,
        needs_factors: bool,
        overwrite: bool = False,
    ) -> list[torch.Tensor]:
        if not _has_kernels(w):
            return super().linear_backward(grad_y, x, w, needs_x, needs_factors, overwrite)
        m, n = w.weight.shape
        dtype = w.dtype
        grad_y2d = grad_y.reshape(-1, m)
        work = _elementwise(w)
        grads = []
        if needs_x:
            grad_x = torch.empty(grad_y2d.shape[0], n, dtype=dtype, device="cpu")
            for columns, chunk in _scaled_chunks(work, w, by_rows=False):
                torch.mm(grad_y2d, chunk, out=grad_x[:, columns])
            grads.append(grad_x.view(x.shape).to(x.dtype))
        if needs_factors:
            x2d = x.reshape(-1, n).to(dtype)
            by_rows = m >= n  # cutting the longer side leaves the matmul the better shape
            # 4096×11008 in bfloat16 took 1.08 and 1.25 times the whole product (512 and 2048 tokens) in chunks of 2^23
            # elements, and 0.93 and 0.91 times in these; in float32 the larger ones are better
            chunk_elements = CHUNK_ELEMENTS if dtype.itemsize > 2 else CHUNK_ELEMENTS // 2
            for rows, columns in _regions(m, n, by_rows, chunk_elements):
                product = work.buffer("chunk", rows.stop - rows.start, columns.stop - columns.start, dtype)
                torch.mm(grad_y2d[:, rows].t(), x2d[:, columns], out=product)
                work.add_factor_gradients(product, rows, columns)
            grads.extend(work.factor_gradients())
        return grads

    def factor_gradients(
        self, product: torch.Tensor, weight: torch.Tensor, factors: Sequence[Factors]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        work = _elementwise(ScaledWeight(weight, factors, True, product.dtype), product)
        work.add_factor_gradients(product, slice(0, weight.shape[0]), slice(0, weight.shape[1]))
        grads = work.factor_gradients()
        return list(zip(grads[::2], grads[1::2], strict=True))


cpu = Cpu()


def _has_kernels(w: ScaledWeight) -> bool:
    """Whether this walks a weight in chunks. A compressed one without a compiled pass is expanded first."""
    if isinstance(w.weight, Compressed):
        return bitmask.supports(w.weight, w.factors, w.dtype)
    return len(w.factors) > 0


def _is_prompt(tokens: int, w: ScaledWeight) -> bool:
    """Whether tokens are multiplied in the cache that a compressed weight is expanded in."""
    assert isinstance(w.weight, Compressed)
    tokens_of_prompts = _PROMPT_TOKENS_WITH_ADAPTER if w.factors else _PROMPT_TOKENS
    return tokens in tokens_of_prompts and bitmask_tokens.supports_prompt(w.weight, w.factors, w.dtype)


def _takes_groups(tokens: int, w: ScaledWeight) -> bool:
    """Whether more tokens than one call takes are multiplied by the values of a compressed weight as they are."""
    assert isinstance(w.weight, Compressed)
    if w.weight.values.dtype != w.dtype or w.factors or tokens == 0:
        return False
    stored = w.weight.values.numel() / max(w.weight.shape.numel(), 1)
    return tokens * stored <= _grouped_tokens(w.dtype)


@cache
def _grouped_tokens(dtype: torch.dtype) -> float:
    if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        return 0.0
    return _GROUPED_TOKENS.get(dtype, _GROUPED_TOKENS_DEFAULT)


def _in_shape_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    # not a view: see `KernelBackend.linear_by_weight`
    result: torch.Tensor = torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[1]))
    return result


def _elementwise(w: ScaledWeight, other: torch.Tensor | None = None) -> Elementwise:
    """`other` is a tensor to write or read next to the weight, where that is not a buffer of ours."""
    if isinstance(w.weight, Compressed):
        return bitmask.BitmaskElementwise(w.weight, w.factors)
    is_native = NativeElementwise.supports(w.dense, w.factors, w.dtype, other)
    return (NativeElementwise if is_native else TiledElementwise)(w.dense, w.factors)


def _scaled_chunks(work: Elementwise, w: ScaledWeight, by_rows: bool) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield `(chunk, W'[chunk])`, or `W'[:, chunk]`. All are written into the same buffer."""
    m, n = w.weight.shape
    for rows, columns in _regions(m, n, by_rows, CHUNK_ELEMENTS):
        out = work.buffer("chunk", rows.stop - rows.start, columns.stop - columns.start, w.dtype)
        work.write_scaled(out, rows, columns, w.identity)
        yield (rows if by_rows else columns), out


def _regions(m: int, n: int, by_rows: bool, chunk_elements: int) -> Iterator[tuple[slice, slice]]:
    """Cut the rows or the columns of an m×n weight so that a part has about `chunk_elements` elements."""
    size = m if by_rows else n
    count = -(-m * n // chunk_elements)
    # a multiple of the matmul's register blocking, and of the words of a bitmask
    step = -(-size // max(count, 1) // WORD) * WORD if size >= WORD else size
    for start in range(0, size, step):
        part = slice(start, min(start + step, size))
        yield (part, slice(0, n)) if by_rows else (slice(0, m), part)
