# SPDX-License-Identifier: Apache-2.0
"""
The Triton backend, for CUDA, ROCm and XPU devices: one pass over the weight for any number of adapters.

Both passes are bound by memory, and a program does one tile and ends, so what counts is how many bytes the loads of
the programs on a multiprocessor keep in flight. Tiles are sized by that, as the registers come out for an H100 with
Triton 3.7, float32 factors and one adapter. All loads of the weight are 16 bytes wide along its contiguous dimension
(where sizes and strides are multiples of 16 elements). `benchmarks/kernels_gpu.py` measures the speed.

- `scaled_weight`: 8 KiB of W, 256 elements along memory, by 4 warps. bfloat16 W: 64 registers a thread, 8 programs at
  a time, 64 KiB in flight. float32 W: 48 registers, 10 programs, 80 KiB.
- `factor_gradients`: 64×64 elements of W and of the product, by 4 warps (8 in float64). 128 registers, 4 programs at a
  time: 64 KiB in flight in bfloat16, 128 KiB in float32.

The gradients are sums over rows and over columns of the same tiles. Each tile writes its part of both to a workspace,
and a second launch sums the parts in a fixed order: no atomics, the same bits every time. A tile of 64×64 writes 64
numbers for B and 64 for A (for each row block in it, mostly one), which is 4·(64 + 64) / 64² = 1/8 byte an element,
next to the 4 bytes of a bfloat16 W and product that are read.

A compressed weight is expanded and scaled in one pass, too. For few tokens its products are made from the values as
they are loaded; for more, W' is made and multiplied. `benchmarks/kernels_aot.py` compiles these kernels and counts
their registers, loads and instructions; their speed is not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from ..bitmask import BITS, Compressed
from ..factors import Factors, compute_dtype
from .backend import KernelBackend
from .scaled import ScaledWeight


# tuples as arguments of kernels
_MIN_VERSION = (3, 3)

_SCALED_TILE_BYTES = 8192
_SCALED_TILE_LENGTH = 256
_GRADIENT_TILE = 64
# rows, bytes of the bitmask, and bytes of it in the columns of one program: see `triton_bitmask`
_EXPANDED_TILE = (16, 32, 256)
# Up to so many tokens are multiplied straight from the values. By arithmetic, not measured: at 50 % zeros, making W'
# and reading it again moves 5 bytes an element in bfloat16 and 10 in float32, and an H100 issues 10 instructions in
# the time of a byte (67 TFLOP/s, 3.35 TB/s). This way stays near half of that: 26 instructions an element for 16
# tokens on tensor cores; in float32 42 for 8 tokens, but 73 for 16.
_FEW_TOKENS = 16
_FEW_TOKENS_FLOAT32 = 8
# rows, bytes of the bitmask, and parts of the columns that are multiplied apart; on tensor cores 16 tokens at once
_FEW_TOKENS_TILE = (4, 128, 0)
_TENSOR_CORE_TILE = (16, 32, 4)
# the second launch of the gradients sums this many tiles at a time, for this many elements of a gradient
_SUM_TILES = 16
_SUM_COLUMNS = 128


@cache
def is_available() -> bool:
    """Whether Triton can be imported and is recent enough (3.3, the version that PyTorch 2.7 comes with)."""
    try:
        import triton
    except ImportError:
        return False
    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= _MIN_VERSION


class Triton(KernelBackend):
    """One launch for W', two for the gradients."""

    def scaled_weight(self, w: ScaledWeight, out: torch.Tensor | None = None) -> torch.Tensor:
        # `w · (1 + Σ s·b · a)`, except that a zero weight gives zero even where the factor overflows
        from . import triton_kernels

        weight, identity, dtype = w.dense, w.identity, w.dtype
        m, n = weight.shape
        acc = _compute_dtype(weight, factors=w.factors)
        factors = _with_scaling(w.factors, acc)
        # every program reads its tile before it writes it, and no other, so that `out` may be the weight
        out = torch.empty_like(weight, dtype=dtype) if out is None else out
        along, across = _SCALED_TILE_LENGTH, _SCALED_TILE_BYTES // (_SCALED_TILE_LENGTH * weight.element_size())
        rows_first = _rows_first(weight)
        tile_rows, tile_columns = (along, across) if rows_first else (across, along)
        with _on_device_of(weight):
            triton_kernels.scaled_weight_kernel[(_tiles(m, tile_rows) * _tiles(n, tile_columns),)](
                weight,
                out,
                *_arguments(m, factors),
                m,
                n,
                *weight.stride(),
                *out.stride(),
                IDENTITY=identity,
                DTYPE=_triton_dtype(acc),
                TILE_ROWS=tile_rows,
                TILE_COLUMNS=tile_columns,
                ROWS_FIRST=rows_first,
                num_warps=4,
            )
        return out

    def factor_gradients(
        self, product: torch.Tensor, weight: torch.Tensor, factors: Sequence[Factors]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        # the same bits every time
        from . import triton_kernels

        m, n = weight.shape
        acc = _compute_dtype(product, weight, factors=factors)
        grads = [(A.new_empty(A.shape), B.new_empty(B.shape)) for A, B, _ in factors]
        if acc == torch.float64:
            # Triton passes a Python float as float32; gA is linear in B, and gB in A
            factors = [Factors(A.double() * s, B.double() * s, 1.0) for A, B, s in factors]

        row_tiles, column_tiles = _tiles(m, _GRADIENT_TILE), _tiles(n, _GRADIENT_TILE)
        row_blocks = _row_blocks(m, factors)
        ranks = tuple(f.A.shape[0] for f in factors)
        slots = tuple(_blocks_per_tile(m, r) for r in ranks)
        partial_As = tuple(weight.new_empty(row_tiles * s, n, dtype=acc) for s in slots)
        partial_Bs = tuple(weight.new_empty(column_tiles, m, dtype=acc) for _ in factors)
        with _on_device_of(weight):
            triton_kernels.partial_gradients_kernel[(row_tiles * column_tiles,)](
                product,
                weight,
                *_tensors(factors),
                partial_As,
                partial_Bs,
                *row_blocks,
                slots,
                m,
                n,
                *product.stride(),
                *weight.stride(),
                DTYPE=_triton_dtype(acc),
                TILE_ROWS=_GRADIENT_TILE,
                TILE_COLUMNS=_GRADIENT_TILE,
                ROWS_FIRST=_rows_first(weight),
                num_warps=8 if acc == torch.float64 else 4,
            )
            programs = max(max(ranks) * _tiles(n, _SUM_COLUMNS), _tiles(m, _SUM_COLUMNS))
            triton_kernels.sum_partial_gradients_kernel[(programs, 2 * len(factors))](
                partial_As,
                partial_Bs,
                *(tuple(pair) for pair in zip(*grads, strict=True)),
                tuple(float(f.scaling) for f in factors),
                ranks,
                *row_blocks,
                slots,
                m,
                n,
                column_tiles,
                TILE_ROWS=_GRADIENT_TILE,
                TILES=_SUM_TILES,
                COLUMNS=_SUM_COLUMNS,
                num_warps=4,
            )
        return grads

    def compressed_weight(self, w: ScaledWeight, out: torch.Tensor | None = None) -> torch.Tensor:
        from . import triton_bitmask

        values, bitmask, row_offsets, n = _compressed(w)
        m = len(bitmask)
        out = values.new_empty(m, n, dtype=w.dtype) if out is None else out
        acc = _compute_dtype(values, out, factors=w.factors)
        factors = _with_scaling(w.factors, acc)
        rows, tile_bytes, span = _EXPANDED_TILE
        # without adapters the bits are copied, whatever number they are
        bits = BITS[values.dtype] if not factors and w.dtype == values.dtype else None
        with _on_device_of(values):
            triton_bitmask.expanded_weight_kernel[(_tiles(m, rows) * _tiles(bitmask.shape[1], span),)](
                values.view(bits) if bits else values,
                bitmask,
                row_offsets,
                out.view(bits) if bits else out,
                *_arguments(m, factors),
                m,
                n,
                bitmask.shape[1],
                *out.stride(),
                IDENTITY=w.identity,
                DTYPE=_triton_dtype(acc),
                ROWS=rows,
                BYTES=tile_bytes,
                SPAN=span,
                num_warps=4,
            )
        return out

    def compressed_linear(self, x: torch.Tensor, w: ScaledWeight, bias: torch.Tensor | None) -> torch.Tensor:
        values, bitmask, row_offsets, n = _compressed(w)
        m, x2d = len(bitmask), x.to(w.dtype).reshape(x.shape[:-1].numel(), n).contiguous()
        bias = None if bias is None else bias.to(w.dtype).contiguous()
        if len(x2d) > (_FEW_TOKENS_FLOAT32 if w.dtype == torch.float32 else _FEW_TOKENS):
            y = F.linear(x2d, self.compressed_weight(w), bias)
            # not a view: see `linear_by_weight`
            result: torch.Tensor = torch.ops.aten._unsafe_view(y, (*x.shape[:-1], m))
            return result
        from . import triton_bitmask

        y = x2d.new_empty(*x.shape[:-1], m)
        acc = _compute_dtype(values, factors=w.factors)
        on_tensor_cores = len(x2d) > 1 and w.dtype != torch.float32
        rows, tile_bytes, groups = _TENSOR_CORE_TILE if on_tensor_cores else _FEW_TOKENS_TILE
        with _on_device_of(values):
            triton_bitmask.few_tokens_kernel[(_tiles(m, rows),)](
                x2d,
                values,
                bitmask,
                row_offsets,
                bias,
                y,
                *_arguments(m, _with_scaling(w.factors, acc)),
                m,
                n,
                bitmask.shape[1],
                len(x2d),
                IDENTITY=w.identity,
                DTYPE=_triton_dtype(acc),
                ROWS=rows,
                BYTES=tile_bytes,
                TOKENS=_FEW_TOKENS if on_tensor_cores else 1 << max(len(x2d) - 1, 0).bit_length(),
                GROUPS=groups,
                # Triton's interpreter knows no bfloat16 matmul; its products are exact in float32
                MATMUL=_triton_dtype(torch.float32 if values.device.type == "cpu" else w.dtype),
                num_warps=4,
            )
        return y

    def linear_backward(
        self,
        grad_y: torch.Tensor,
        x: torch.Tensor,
        w: ScaledWeight,
        needs_x: bool,
        needs_factors: bool,
        overwrite: bool = False,
    ) -> list[torch.Tensor]:
        if isinstance(w.weight, Compressed):
            if needs_factors:
                dense = self.compressed_weight(w._replace(factors=[], dtype=w.weight.values.dtype))
                w, overwrite = w._replace(weight=dense), True
            else:
                w = w._replace(weight=self.compressed_weight(w), factors=[])
        return super().linear_backward(grad_y, x, w, needs_x, needs_factors, overwrite)


def _compressed(w: ScaledWeight) -> Compressed:
    assert isinstance(w.weight, Compressed)
    values, bitmask, row_offsets, n = w.weight
    return Compressed(values.contiguous(), bitmask.contiguous(), row_offsets, n)


def _with_scaling(factors: Sequence[Factors], acc: torch.dtype) -> Sequence[Factors]:
    """The factors with a scaling that a kernel can take: Triton passes a Python float as float32."""
    return [Factors(A, B.double() * s, 1.0) for A, B, s in factors] if acc == torch.float64 else factors


def _arguments(rows: int, factors: Sequence[Factors]) -> tuple[Any, ...]:
    """The arguments of a kernel for the factors: A, B, s, and the row blocks of each adapter."""
    scalings = tuple(float(f.scaling) for f in factors)
    return (*_tensors(factors), scalings, *_row_blocks(rows, factors))


def _tensors(factors: Sequence[Factors]) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """All A and all B. Parameters are contiguous: nothing is copied."""
    return tuple(f.A.contiguous() for f in factors), tuple(f.B.contiguous() for f in factors)


def _row_blocks(rows: int, factors: Sequence[Factors]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of each adapter, the rows of a row block and the number of blocks with one row more."""
    ranks = [f.A.shape[0] for f in factors]
    return tuple(rows // r for r in ranks), tuple(rows % r for r in ranks)


def _blocks_per_tile(rows: int, r: int) -> int:
    """How many row blocks at most a tile of the gradients has rows of."""
    if rows % (r * _GRADIENT_TILE) == 0:
        return 1
    # the most that fit with a row of the block before and one of the block behind
    return min(r, (_GRADIENT_TILE - 2) // (rows // r) + 2)


def _rows_first(weight: torch.Tensor) -> bool:
    """Whether the rows are the dimension that memory runs along, as those of a transposed view are."""
    return weight.stride(0) < weight.stride(1)


def _tiles(size: int, tile: int) -> int:
    return -(-size // tile)


def _compute_dtype(*tensors: torch.Tensor, factors: Sequence[Factors]) -> torch.dtype:
    return compute_dtype(*tensors, *(t for A, B, _ in factors for t in (A, B)))


def _triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return getattr(tl, str(dtype).removeprefix("torch."))


def _on_device_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    # Triton launches on the current device, which need not be that of this layer
    if tensor.device.type == "cpu":
        return nullcontext()  # Triton's interpreter
    module: Any = torch.get_device_module(tensor.device)
    guard: AbstractContextManager[Any] = module.device(tensor.device)
    return guard


triton = Triton()
