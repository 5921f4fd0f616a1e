# SPDX-License-Identifier: Apache-2.0
"""
Compressed weights on the CPU: `bitmask_*.cpp`, through ctypes.

- `compress`, `expand` and `scaled_values` (a merge) always have a result: without a compiled pass it is made in
  PyTorch's operations, with the same bits.
- `BitmaskElementwise` serves `scaled_weight`, `linear`, `linear_backward` and `factor_gradients` of this package: they
  take a `Compressed` for the weight.

A compressed weight is one that `check_compressed` has passed, or that `compress` has made: the kernels rely on it. It
may be one layer of a stack: its bitmask and row offsets, with the values of all layers.

Three tiers are compiled: AVX-512 with VBMI2 and BF16, AVX2 with FMA, and plain C++. The processor decides, and
PyTorch's own `ATEN_CPU_CAPABILITY` limits it.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...bitmask import BITS, WORD, Compressed, bitmask_bytes, decompress, unpack_bits
from ...bitmask import compress as plain_compress
from ...factors import Factors, compute_dtype
from .bitmask_calls import (
    NAMES,
    function_of,
    gradient_parts,
    part_of,
    pointer_to,
    tier,
    weight_of,
)
from .elementwise import Elementwise
from .native import make_adapters
from .tiled import TiledElementwise


def supports(compressed: Compressed, factors: Sequence[Factors], dtype: torch.dtype) -> bool:
    """Whether there is a compiled pass for a weight and factors, with W' in a dtype."""
    values, bitmask, row_offsets, _ = compressed
    return (
        values.dtype in NAMES
        and dtype in NAMES
        and values.is_cpu
        and values.is_contiguous()
        and bitmask.is_contiguous()
        and row_offsets.is_contiguous()
        and (not factors or compute_dtype(*(t for A, B, _ in factors for t in (A, B))) == torch.float32)
        and tier() is not None
    )


def compress(weight: Tensor) -> Compressed:
    """Store a weight without its zeros; see [`peft_spp.functional.bitmask.compress`]."""
    if weight.device.type != "cpu" or weight.dtype not in BITS or weight.ndim < 2 or tier() is None:
        return plain_compress(weight)
    n = weight.shape[-1]
    rows = weight.detach().resolve_neg().reshape(math.prod(weight.shape[:-1]), n)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    bitmask = torch.empty(*weight.shape[:-1], bitmask_bytes(n), dtype=torch.uint8, device="cpu")
    row_offsets = torch.empty(len(rows) + 1, dtype=torch.int64, device="cpu")
    dense, stride = pointer_to(rows), ctypes.c_int64(rows.stride(0))
    threads = ctypes.c_int64(torch.get_num_threads())
    sizes = (ctypes.c_int64(len(rows)), ctypes.c_int64(n))
    function_of("count", weight.dtype)(dense, stride, *sizes, pointer_to(bitmask), pointer_to(row_offsets), threads)
    values = torch.empty(int(row_offsets[-1]), dtype=weight.dtype, device="cpu")
    compressed = Compressed(values, bitmask, row_offsets, n)
    function_of("take", weight.dtype)(dense, stride, ctypes.byref(weight_of(compressed)), threads)
    return compressed


def expand(
    compressed: Compressed,
    rows: slice | None = None,
    columns: slice | None = None,
    out: Tensor | None = None,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
) -> Tensor:
    """
    A part of the weight with its zeros, bit for bit.

    Args:
        compressed ([`Compressed`]): The weight, shape `(..., m, n)`; its rows are those of all layers.
        rows (`slice`, *optional*): Which rows, by default all.
        columns (`slice`, *optional*):
            Which columns, by default all. It starts at a multiple of 64, and stops at one or at n.
        out (`torch.Tensor`, *optional*): Where to write, of the weight's dtype; its rows are contiguous.
        starts (`torch.Tensor`, *optional*):
            int64, one for each of the rows: where its values begin at the first column. By default they are counted.
        ends (`torch.Tensor`, *optional*): Receives where they end, which is `starts` for the columns that follow.

    Returns:
        `torch.Tensor`: `out`, or a new tensor of shape `(rows, columns)`.

    Raises:
        ValueError: If `out` does not fit, or the columns cut a word of the bitmask.
    """
    matrix = _matrix(compressed)
    m, n = matrix.shape
    rows, columns = rows or slice(0, m), columns or slice(0, n)
    _check_columns(columns, n)
    shape, dtype = (rows.stop - rows.start, columns.stop - columns.start), compressed.values.dtype
    out = torch.empty(shape, dtype=dtype, device="cpu") if out is None else out
    if out.shape != shape or out.dtype != dtype or (out.numel() and out.stride(1) != 1):
        raise ValueError(
            f"expand: `out` has shape {tuple(out.shape)}, dtype {out.dtype} and strides {out.stride()}, and must have "
            f"shape {shape}, dtype {dtype} and contiguous rows"
        )
    if not supports(compressed, (), dtype):
        dense = decompress(Compressed(matrix.values, *_rows_of(matrix, rows), n))[:, columns]
        if ends is not None:
            before = unpack_bits(matrix.bitmask[rows], n)[:, : columns.stop].sum(1)
            torch.add(matrix.row_offsets[rows], before, out=ends)
        return out.copy_(dense)
    function_of("expand", out.dtype)(
        ctypes.byref(weight_of(matrix)), ctypes.byref(part_of(rows, columns, out, starts, ends)), pointer_to(out)
    )
    return out


def scaled_values(compressed: Compressed, factors: Sequence[Factors], out: Tensor | None = None) -> Tensor:
    """
    The values of the merged weight in `out`, which may be the values themselves; see
    [`peft_spp.functional.merged_weight`]. The places stay those of the weight: a value that becomes zero is a `+0.0`
    that is stored. Of a layer of a stack, only the layer's own values are written.
    """
    values, bitmask, row_offsets, n = compressed
    out = torch.empty_like(values) if out is None else out
    if out.shape != values.shape or out.dtype != values.dtype or not out.is_contiguous():
        raise ValueError(
            f"scaled_values: `out` has shape {tuple(out.shape)} and dtype {out.dtype}, and must be a contiguous "
            f"vector of {len(values)} values of dtype {values.dtype}"
        )
    m = len(bitmask)
    if not supports(compressed, factors, values.dtype):
        dense = decompress(compressed)
        merged = torch.empty_like(dense)
        TiledElementwise(dense, factors).write_scaled(merged, slice(0, m), slice(0, n), True)
        merged.add_(0.0).masked_fill_(dense == 0, 0.0)
        out[row_offsets[0] : row_offsets[-1]] = merged[unpack_bits(bitmask, n)]
        return out
    part = part_of(slice(0, m), slice(0, n))
    scaled = float_factors(factors)
    adapters = make_adapters(scaled)
    function_of("merge", values.dtype)(
        ctypes.byref(weight_of(compressed)),
        ctypes.byref(part),
        pointer_to(out),
        adapters,
        ctypes.c_int64(len(factors)),
    )
    return out


class BitmaskElementwise(Elementwise):
    """
    Compressed weights of any dtype that they have; see [`Elementwise`].

    Parts are of columns that start at a multiple of 64. Where the values of each row begin there is kept from part to
    part, so that parts that follow each other need no counting.
    """

    weight: Compressed

    def __init__(self, compressed: Compressed, factors: Sequence[Factors]) -> None:
        super().__init__(compressed, factors)
        self.scaled_factors = [(A.contiguous(), B.contiguous()) for A, B in self.scaled_factors]
        self._ends: dict[tuple[int, int, int], Tensor] = {}

    def write_scaled(self, out: Tensor, rows: slice, columns: slice, identity: bool) -> None:
        weight = ctypes.byref(weight_of(self.weight))
        part = ctypes.byref(self._part(out, rows, columns))
        if not self.factors and identity and out.dtype == self.weight.values.dtype:
            function_of("expand", out.dtype)(weight, part, pointer_to(out))
            return
        adapters = make_adapters(self.scaled_factors)
        count, with_base = ctypes.c_int64(len(adapters)), ctypes.c_int64(identity)
        self._function("scale", out)(weight, part, pointer_to(out), adapters, count, with_base)

    def add_factor_gradients(self, product: Tensor, rows: slice, columns: slice) -> None:
        weight, part = ctypes.byref(weight_of(self.weight)), self._part(product, rows, columns, keep=False)
        sizes = gradient_parts(part), rows.stop - rows.start
        parts = [torch.empty(sizes, dtype=torch.float32, device="cpu") for _ in self.factors]
        gradients = [(grad_A, own) for (grad_A, _), own in zip(self.gradients, parts, strict=True)]
        adapters = make_adapters(self.scaled_factors, gradients)
        count = ctypes.c_int64(len(adapters))
        self._function("add_gradients", product)(weight, ctypes.byref(part), pointer_to(product), adapters, count)
        for (_, grad_B), own in zip(self.gradients, parts, strict=True):
            grad_B[rows] += own.sum(dim=0).unsqueeze(1)

    def _function(self, name: str, other: Tensor) -> Any:
        return function_of(name, self.weight.values.dtype, other.dtype)

    def _part(self, other: Tensor, rows: slice, columns: slice, keep: bool = True) -> Any:
        n = self.weight.columns
        _check_columns(columns, n)
        starts = self._ends.get((rows.start, rows.stop, columns.start))
        ends = None
        if keep and columns.stop < n:
            key = (rows.start, rows.stop, columns.stop)
            ends = self._ends[key] = torch.empty(rows.stop - rows.start, dtype=torch.int64, device="cpu")
        return part_of(rows, columns, other, starts, ends)


def _matrix(compressed: Compressed) -> Compressed:
    values, bitmask, row_offsets, n = compressed
    return Compressed(values, bitmask.reshape(len(row_offsets) - 1, bitmask.shape[-1]), row_offsets, n)


def _rows_of(matrix: Compressed, rows: slice) -> tuple[Tensor, Tensor]:
    return matrix.bitmask[rows], matrix.row_offsets[rows.start : rows.stop + 1]


def _check_columns(columns: slice, n: int) -> None:
    if columns.start % WORD or (columns.stop % WORD and columns.stop != n):
        raise ValueError(
            f"columns {columns.start} to {columns.stop} of a compressed weight with {n}: they must start at a "
            f"multiple of {WORD}, and stop at one or at the last column"
        )


def float_factors(factors: Sequence[Factors]) -> list[tuple[Tensor, Tensor]]:
    return [(A.float().contiguous(), (B.float() * s).contiguous()) for A, B, s in factors]
