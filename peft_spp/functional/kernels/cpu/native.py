# SPDX-License-Identifier: Apache-2.0
"""Elementwise work in one pass over the weight: `native.cpp`, through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from ....native.library import load_library
from ...factors import Factors, compute_dtype
from .elementwise import Elementwise


_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class Adapter(ctypes.Structure):
    """One adapter, as `elements.h` has it."""

    _fields_ = (
        ("A", ctypes.c_void_p),
        ("B", ctypes.c_void_p),
        ("grad_A", ctypes.c_void_p),
        ("grad_B_parts", ctypes.c_void_p),
        ("r", ctypes.c_int64),
    )


class _Region(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            "m",
            "n",
            "row",
            "rows",
            "column",
            "columns",
            "transposed",
            "stride",
            "other_stride",
        )
    )


class NativeElementwise(Elementwise):
    """
    Float32 and bfloat16, weights stored by rows or by columns; see [`Elementwise`].

    A pass reads W once and writes or reads the other tensor once. In PyTorch's operations the intermediates, each of
    a tile's size, go through the outer caches: on 2 cores of an EPYC 9004 making W' of 11008×4096 takes 5.9 ms here
    and 18 ms there in bfloat16, the sums over gyᵀx 14 and 78 ms.
    """

    def __init__(self, weight: torch.Tensor, factors: Sequence[Factors]) -> None:
        super().__init__(weight, factors)
        self.scaled_factors = [(A.contiguous(), B.contiguous()) for A, B in self.scaled_factors]

    @staticmethod
    def supports(
        weight: torch.Tensor, factors: Sequence[Factors], dtype: torch.dtype, other: torch.Tensor | None = None
    ) -> bool:
        """Whether the tensors can be walked by this, and there is a compiler for it."""
        along = 0 if weight.stride(0) < weight.stride(1) else 1
        return (
            weight.dtype in _DTYPES
            and dtype in _DTYPES
            and compute_dtype(*(t for A, B, _ in factors for t in (A, B))) == torch.float32
            and weight.stride(along) == 1
            and (other is None or other.stride(along) == 1)
            and load_library() is not None
        )

    def write_scaled(self, out: torch.Tensor, rows: slice, columns: slice, identity: bool) -> None:
        adapters = make_adapters(self.scaled_factors)
        self._call("scale", out, self._region(out, rows, columns), adapters, ctypes.c_int64(identity))

    def add_factor_gradients(self, product: torch.Tensor, rows: slice, columns: slice) -> None:
        region = self._region(product, rows, columns)
        parts = [
            torch.empty(
                _library().grad_B_parts(ctypes.byref(region), ctypes.c_int64(A.shape[0])),
                rows.stop - rows.start,
                dtype=torch.float32,
                device="cpu",
            )
            for A, _ in self.scaled_factors
        ]
        gradients = [(grad_A, part) for (grad_A, _), part in zip(self.gradients, parts, strict=True)]
        adapters = make_adapters(self.scaled_factors, gradients)
        self._call("add_gradients", product, region, adapters)
        for (_, grad_B), part in zip(self.gradients, parts, strict=True):
            grad_B[rows] += part.sum(dim=0).unsqueeze(1)

    def _call(self, name: str, other: torch.Tensor, region: _Region, adapters: Any, *args: Any) -> None:
        function = getattr(_library(), f"{name}_{_DTYPES[self.weight.dtype]}_{_DTYPES[other.dtype]}")
        first = self.weight[region.row :, region.column :]
        function(
            ctypes.c_void_p(first.data_ptr()),
            ctypes.c_void_p(other.data_ptr()),
            ctypes.byref(region),
            adapters,
            ctypes.c_int64(len(adapters)),
            *args,
        )

    def _region(self, other: torch.Tensor, rows: slice, columns: slice) -> _Region:
        m, n = self.weight.shape
        line = 1 if self.transposed else 0
        return _Region(
            m,
            n,
            rows.start,
            rows.stop - rows.start,
            columns.start,
            columns.stop - columns.start,
            self.transposed,
            self.weight.stride(line),
            other.stride(line),
        )


def make_adapters(
    scaled_factors: Sequence[tuple[torch.Tensor, torch.Tensor]],
    gradients: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> Any:
    """
    Adapters as the C++ sources take them, of A and B times the scaling, float32 and contiguous; the tensors must
    outlive the call. With `gradients` that of A is added there, and the parts of that of B are written.
    """
    pointers = []
    for index, (A, B) in enumerate(scaled_factors):
        written = (None, None) if gradients is None else tuple(t.data_ptr() for t in gradients[index])
        pointers.append(Adapter(A.data_ptr(), B.data_ptr(), *written, A.shape[0]))
    return (Adapter * len(pointers))(*pointers)


def _library() -> ctypes.CDLL:
    library = load_library()
    assert library is not None, "supports() is asked first"
    return library
