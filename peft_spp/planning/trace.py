# SPDX-License-Identifier: Apache-2.0
"""
What a training step allocates and computes, followed on the meta device, where nothing is.

A model on the meta device runs the same operations with the same shapes as anywhere else, and autograd keeps the same
tensors. So the memory of a step is the sum of the storages that are alive, at its highest.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..functional.bitmask import Compressed
from ..functional.factors import Factors
from ..functional.kernels.backend import KernelBackend
from ..functional.kernels.cpu.backend import CHUNK_ELEMENTS
from ..functional.kernels.ops import IMPLEMENTATIONS
from ..functional.kernels.scaled import ScaledWeight


_ATEN = torch.ops.aten
# where the two factors are among the arguments
_MATMULS = {
    **dict.fromkeys((_ATEN.mm.default, _ATEN.bmm.default, _ATEN.matmul.default, _ATEN._grouped_mm.default), 0),
    **dict.fromkeys((_ATEN.addmm.default, _ATEN.baddbmm.default), 1),
}


@dataclass(frozen=True)
class StepTrace:
    """What one training step takes on top of the model, its factors and the optimizer's states.

    Args:
        kept (`int`): The bytes that the forward pass leaves for the backward pass.
        peak (`int`): The bytes at the highest level of the step, gradients included.
        flops (`int`): The floating-point operations of matmuls and attention, forward and backward.
    """

    kept: int
    peak: int
    flops: int


def trace_step(model: nn.Module, run: Callable[[], Tensor], on_cpu: bool = False) -> StepTrace:
    """
    Follow a forward and a backward pass.

    Args:
        model (`nn.Module`): The model on the meta device, in the mode to follow.
        run (`Callable[[], torch.Tensor]`): The forward pass, which returns the loss.
        on_cpu (`bool`): Whether to count the buffers of the CPU's kernels instead of those of a GPU's.
    """
    known = [*model.parameters(), *model.buffers()]
    live = _LiveStorages(_CpuSizes() if on_cpu else _GpuSizes(), known)
    with live, _fused_attention(live, on_cpu):
        loss = run()
        kept = live.level
        loss.backward()
    del loss
    for parameter in model.parameters():
        parameter.grad = None
    return StepTrace(kept, live.peak, live.flops)


class _LiveStorages(TorchDispatchMode):
    """Counts the bytes of all storages that operations make and that are still there."""

    def __init__(self, backend: KernelBackend, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.level = self.peak = self.flops = 0
        self._backend = backend
        self._known = {id(tensor.untyped_storage()) for tensor in known}
        self._held = list(known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ATEN._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True  # Transformers asks whether a batch is free of padding and of packed sequences
        kwargs = kwargs or {}
        self.flops += _flops(func, args)
        implementation = IMPLEMENTATIONS.get(func.name())
        if func is _ATEN._grouped_mm.default:
            result = _grouped_mm(*args, **kwargs)
        elif implementation is None:
            result = func(*args, **kwargs)
        else:
            with self:  # what the kernel allocates in between
                result = implementation(self._backend, *args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._known:
            return
        self._known.add(id(storage))
        self.level += storage.nbytes()
        self.peak = max(self.peak, self.level)
        weakref.finalize(storage, self._remove, id(storage), storage.nbytes()).atexit = False

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.level -= size


def _flops(func: Any, args: Sequence[Any]) -> int:
    """Two for each multiply-add of a matmul."""
    matmul = _MATMULS.get(func)
    if matmul is not None:
        a, b = args[matmul], args[matmul + 1]
        return 2 * a.numel() * b.shape[-1]
    if func is _ATEN.linear.default:
        return 2 * args[0].numel() * args[1].shape[0]
    return 0


def _grouped_mm(a: Tensor, b: Tensor, offsets: Tensor | None = None, *_: Any, **named: Any) -> Tensor:
    """The result of a matmul for each expert; on the meta device PyTorch knows it in bfloat16 only."""
    offsets = named.get("offs", offsets)
    if a.ndim == b.ndim == 2 and offsets is not None:
        return a.new_empty((len(offsets), a.shape[0], b.shape[1]))
    return a.new_empty((*a.shape[:-1], b.shape[-1]))


@contextmanager
def _fused_attention(live: _LiveStorages, on_cpu: bool) -> Iterator[None]:
    """
    While active, attention takes what the fused kernels do; meta would make the matrix of all pairs of tokens.

    A mode for functions would not do: it is not there in the backward pass, where checkpointing computes again.
    """
    before = F.scaled_dot_product_attention

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        *_: Any,
        **__: Any,
    ) -> Any:
        if on_cpu and dropout_p:
            raise ValueError(
                f"a CPU has no fused attention with dropout ({dropout_p}), which is not planned here: set the model's "
                "attention dropout to 0"
            )
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            # PyTorch makes numbers of it, which are kept for the backward pass of each layer
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
        return _Attention.apply(query, key, value, attn_mask, live)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before


class _Attention(torch.autograd.Function):
    """The shapes of fused attention: it keeps its inputs, its output, and a sum a row."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, live: _LiveStorages
    ) -> Tensor:
        # in the layout of the queries, (batch, tokens, heads, size), which the next layer takes as it is
        *heads, tokens = query.shape[:-1]
        result = query.new_empty((*heads[:-1], tokens, heads[-1], value.shape[-1])).transpose(-3, -2)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, result, sums)
        ctx.live = live
        live.flops += 2 * query.numel() * key.shape[-2] + 2 * result.numel() * key.shape[-2]
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, result, _ = ctx.saved_tensors
        # the scores again, the gradients of values and scores, and those of queries and keys
        ctx.live.flops += 6 * query.numel() * key.shape[-2] + 4 * result.numel() * key.shape[-2]
        pairs = zip((query, key, value, mask, None), ctx.needs_input_grad, strict=True)
        return tuple(torch.empty_like(one) if needs else None for one, needs in pairs)


class _GpuSizes(KernelBackend):
    """Allocates what the Triton kernels do, and computes the matmuls."""

    def scaled_weight(self, w: ScaledWeight, out: Tensor | None = None) -> Tensor:
        return torch.empty_like(w.dense, dtype=w.dtype) if out is None else out

    def factor_gradients(
        self, product: Tensor, weight: Tensor, factors: Sequence[Factors]
    ) -> list[tuple[Tensor, Tensor]]:
        # each tile of 64×64 elements leaves 128 sums in float32
        parts = product.new_empty(-(-product.numel() // 4096) * 128, dtype=torch.float32)
        del parts
        return [(torch.empty_like(A), torch.empty_like(B)) for A, B, _ in factors]

    def compressed_weight(self, w: ScaledWeight, out: Tensor | None = None) -> Tensor:
        return _expanded(w) if out is None else out

    def compressed_linear(self, x: Tensor, w: ScaledWeight, bias: Tensor | None) -> Tensor:
        return self.linear_by_weight(x, w._replace(weight=_expanded(w)), bias, overwrite=True)

    def linear_backward(
        self, grad_y: Tensor, x: Tensor, w: ScaledWeight, needs_x: bool, needs_factors: bool, *_: Any
    ) -> list[Tensor]:
        is_compressed = isinstance(w.weight, Compressed)
        dense = w._replace(weight=_expanded(w)) if is_compressed else w
        return super().linear_backward(grad_y, x, dense, needs_x, needs_factors, is_compressed)


class _CpuSizes(_GpuSizes):
    """Allocates what the CPU's kernels do: W' and the gradients of a weight in chunks."""

    def linear_by_weight(self, x: Tensor, w: ScaledWeight, bias: Tensor | None, overwrite: bool = False) -> Tensor:
        m, n = w.weight.shape
        result = x.new_empty((*x.shape[:-1], m), dtype=w.dtype)
        chunk = x.new_empty(min(m * n, CHUNK_ELEMENTS), dtype=w.dtype)
        del chunk
        return result

    def linear_backward(
        self, grad_y: Tensor, x: Tensor, w: ScaledWeight, needs_x: bool, needs_factors: bool, *_: Any
    ) -> list[Tensor]:
        m, n = w.weight.shape
        grads = [torch.empty_like(x)] if needs_x else []
        chunk = x.new_empty(min(m * n, CHUNK_ELEMENTS), dtype=w.dtype)
        del chunk
        if needs_factors:
            grads += [grad for A, B, _ in w.factors for grad in (torch.empty_like(A), torch.empty_like(B))]
        return grads


def _expanded(w: ScaledWeight) -> Tensor:
    assert isinstance(w.weight, Compressed)
    return w.weight.values.new_empty(w.weight.shape, dtype=w.dtype)
