# SPDX-License-Identifier: Apache-2.0
"""
A stack of weights without their zeros, such as the experts of a mixture, in the code that computes with a dense one.

Experts of Transformers are multiplied in several ways: one by one (`F.linear` or `@` with `stack[index]`), those of
each token at once (`torch.bmm` with `stack[indices]`), or all of them by groups of tokens (`F.grouped_mm`). A
[`CompressedStack`] stands for the stack in any of them, and multiplies expert by expert, each as
[`compressed_linear`] does. Whatever else is computed with it, is computed with the dense stack.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from .autograd import autocast_off, autocasts
from .bitmask import Compressed, one_of_stack
from .compressed import compressed_linear, decompress
from .dequantized import spp_linear_dequantized
from .factors import Factors, check_stack, factors_of_each
from .weight import scaled_weight


class CompressedStack(Tensor):
    """
    Stands for a stack of weights, or W' of it, without being made.

    Args:
        weight ([`Compressed`]): W, shape `(E, m, n)`. It gets no gradient.
        factors (`Sequence[Factors]`): The factors of each active adapter; without any, W' is W.
        inputs_first (`bool`): Whether the weights are stored as (in_features, out_features), for the factors.
    """

    weight: Compressed
    factors: list[list[Factors]]
    inputs_first: bool
    swapped: bool
    which: int | Tensor | None

    @staticmethod
    def __new__(
        cls: Any, weight: Compressed, factors: Sequence[Factors] = (), *, inputs_first: bool = False
    ) -> CompressedStack:
        experts, m, n = weight.shape
        check_stack(weight, factors, inputs_first)
        own = factors_of_each(factors, experts) if factors else []
        return _view(weight, own, inputs_first, False, None, (experts, m, n))

    def dense(self) -> Tensor:
        """The dense tensor, differentiable in the factors."""
        if isinstance(self.which, int):
            result = _dense_expert(self, self.which)
        elif self.which is None:
            result = torch.stack([_dense_expert(self, index) for index in range(self.weight.shape[0])])
        else:
            chosen, place = self.which.unique(return_inverse=True)
            result = torch.stack([_dense_expert(self, index) for index in chosen.tolist()])[place]
        return result.mT if self.swapped else result

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, factors={len(self.factors)})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DESCRIBING:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        compute = _COMPUTED.get(func)
        result = None if compute is None else compute(*args, **kwargs)
        return func(*_densely(args), **_densely(kwargs)) if result is None else result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*_densely(args), **_densely(kwargs or {}))


def _view(
    weight: Compressed,
    factors: list[list[Factors]],
    inputs_first: bool,
    swapped: bool,
    which: int | Tensor | None,
    shape: Sequence[int],
) -> CompressedStack:
    values = weight.values
    made: CompressedStack = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
        CompressedStack, tuple(shape), dtype=values.dtype, device=values.device, requires_grad=False
    )
    made.weight, made.factors, made.inputs_first = weight, factors, inputs_first
    made.swapped, made.which = swapped, which
    return made


def _densely(arguments: Any) -> Any:
    return tree_map(lambda one: one.dense() if isinstance(one, CompressedStack) else one, arguments)


def _dense_expert(stack: CompressedStack, index: int) -> Tensor:
    weight = decompress(one_of_stack(stack.weight, index))
    if not stack.factors:
        return weight
    factors = stack.factors[index]
    return scaled_weight(weight.mT, factors).mT if stack.inputs_first else scaled_weight(weight, factors)


def _product_of(stack: CompressedStack, over_columns: bool) -> Callable[[Tensor, int], Tensor] | None:
    """What multiplies tokens with one expert: the sum runs over the columns of the tensor, or else over its rows."""
    over_last = over_columns != stack.swapped
    if stack.factors and over_last == stack.inputs_first:
        return None  # not the map that the factors are made for
    return partial(_by_columns if over_last else _by_rows, stack)


def _by_columns(stack: CompressedStack, x: Tensor, index: int) -> Tensor:
    return compressed_linear(x, one_of_stack(stack.weight, index), None, stack.factors[index] if stack.factors else ())


def _by_rows(stack: CompressedStack, x: Tensor, index: int) -> Tensor:
    weight = one_of_stack(stack.weight, index)
    dtype = weight.values.dtype
    if x.dtype != dtype and not autocasts(x.device.type):
        raise RuntimeError(f"mat1 and mat2 must have the same dtype, but got {x.dtype} and {dtype}")
    if x.shape[-1] != weight.shape[0]:
        raise RuntimeError(
            f"mat1 and mat2 shapes cannot be multiplied ({x.shape[:-1].numel()}x{x.shape[-1]} and "
            f"{weight.shape[0]}x{weight.columns})"
        )
    factors = stack.factors[index] if stack.factors else ()
    return spp_linear_dequantized(x, lambda: decompress(weight).mT, None, factors)


def _linear(x: Any, stack: Any, bias: Tensor | None = None) -> Tensor | None:
    if isinstance(x, CompressedStack) or not isinstance(stack, CompressedStack) or not isinstance(stack.which, int):
        return None
    product = _product_of(stack, True)
    if product is None:
        return None
    y = product(x, stack.which)
    return y if bias is None else y + bias.to(y.dtype)


def _matmul(x: Any, stack: Any) -> Tensor | None:
    if isinstance(x, CompressedStack) or not isinstance(stack, CompressedStack):
        return _bmm(x, stack)
    if not isinstance(stack.which, int):
        return _bmm(x, stack)
    product = _product_of(stack, False) if x.ndim > 0 else None
    return None if product is None else product(x, stack.which)


def _bmm(x: Any, stack: Any) -> Tensor | None:
    if isinstance(x, CompressedStack):
        # W x is (xᵀ Wᵀ)ᵀ
        turned = _bmm(stack.mT, x.mT) if isinstance(stack, Tensor) and stack.ndim == 3 and x.ndim == 3 else None
        return None if turned is None else turned.mT
    if x.ndim != 3 or stack.ndim != 3 or len(x) != len(stack):
        return None
    product = _product_of(stack, False)
    if product is None:
        return None
    if not isinstance(stack.which, Tensor):
        parts = [product(x[index : index + 1], index) for index in range(len(stack))]
        return torch.cat(parts) if parts else None
    order = stack.which.argsort(stable=True)
    chosen, counts = stack.which.unique(return_counts=True)
    rows = x[order].split(counts.tolist())
    parts = [product(own, index) for own, index in zip(rows, chosen.tolist(), strict=True)]
    # not a view: some code adds to the result in place
    return torch.cat(parts)[order.argsort()] if parts else None


def _grouped_mm(x: Any, stack: Any, offs: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    if isinstance(x, CompressedStack) or offs is None or stack.which is not None or x.ndim != 2:
        return None
    if any(one is not None for one in kwargs.values()):
        return None
    product = _product_of(stack, False)
    # nobody knows them on the meta device, where as many tokens go to each
    ends = [len(x) * (at + 1) // len(offs) for at in range(len(offs))] if offs.is_meta else offs.tolist()
    if product is None or len(ends) != len(stack):
        return None
    with autocast_off(x.device.type):  # as the function itself
        parts, start = [], 0
        for index, end in enumerate(ends):
            if end > start:
                parts.append(product(x[start:end], index))
                start = end
        if start < len(x):  # it leaves them without a value
            parts.append(x.new_zeros(len(x) - start, stack.shape[-1]))
        return torch.cat(parts) if parts else x.new_zeros(0, stack.shape[-1])


def _get_item(stack: Any, index: Any) -> CompressedStack | None:
    if not isinstance(stack, CompressedStack) or stack.which is not None:
        return None
    if isinstance(index, Tensor):
        if index.is_floating_point() or index.dtype in (torch.bool, torch.uint8) or index.ndim > 1:
            return None
        if index.ndim == 1:
            shape = (len(index), *stack.shape[1:])
            index = torch.where(index < 0, index + len(stack), index)
            return _view(stack.weight, stack.factors, stack.inputs_first, stack.swapped, index, shape)
    elif isinstance(index, bool) or not hasattr(index, "__index__"):
        return None
    expert = operator.index(index)
    if not -len(stack) <= expert < len(stack):
        raise IndexError(f"index {expert} is out of bounds for a stack of {len(stack)} weights")
    expert %= len(stack)
    return _view(stack.weight, stack.factors, stack.inputs_first, stack.swapped, expert, stack.shape[1:])


def _transpose(stack: Any, first: int, second: int) -> CompressedStack | None:
    if not isinstance(stack, CompressedStack):
        return None
    dims = {one + stack.ndim if one < 0 else one for one in (first, second)}
    return _swapped(stack) if dims == {stack.ndim - 2, stack.ndim - 1} else None


def _swapped(stack: CompressedStack) -> CompressedStack:
    shape = (*stack.shape[:-2], stack.shape[-1], stack.shape[-2])
    return _view(stack.weight, stack.factors, stack.inputs_first, not stack.swapped, stack.which, shape)


def _swapped_matrix(stack: CompressedStack) -> CompressedStack | None:
    return _swapped(stack) if stack.ndim == 2 else None


def _getter(name: str) -> Any:
    return getattr(Tensor, name).__get__


_DESCRIBING = {
    *map(_getter, ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_meta", "is_cuda", "itemsize")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.stride, Tensor.element_size),
    *(Tensor.is_floating_point, torch.is_floating_point, Tensor.is_contiguous, Tensor.get_device),
}
_COMPUTED: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    **dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.mm), _matmul),
    **dict.fromkeys((torch.bmm, Tensor.bmm), _bmm),
    **{one: _grouped_mm for one in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)) if one},
    Tensor.__getitem__: _get_item,
    **dict.fromkeys((torch.transpose, Tensor.transpose), _transpose),
    _getter("mT"): _swapped,
    **dict.fromkeys((_getter("T"), torch.t, Tensor.t), _swapped_matrix),
}
