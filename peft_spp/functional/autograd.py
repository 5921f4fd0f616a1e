# SPDX-License-Identifier: Apache-2.0
"""What the autograd Functions have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.autograd import forward_ad


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for a type of device. It is never on for meta, which PyTorch does not answer for."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def autocast_off(device_type: str) -> AbstractContextManager[Any]:
    """A context without autocast, which would cast float32 products of small factors again."""
    if autocasts(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def records_gradients(*tensors: torch.Tensor | None) -> bool:
    """
    Whether autograd records what is computed from these tensors. Where it does not, a Function that saves tensors is
    of no use, and the compiler cannot trace it.
    """
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def halves(tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """A and B of each adapter, out of all A followed by all B."""
    return list(tensors[: len(tensors) // 2]), list(tensors[len(tensors) // 2 :])


def is_transformed() -> bool:
    """
    Whether PyTorch follows every operation for more than a backward pass: inside `torch.func` transforms, in the
    backward pass of batched gradients, and in forward-mode differentiation.

    Operators and Functions of our own are opaque to it then, so plain operations have to take their place.
    """
    # There is no public way to ask. PyTorch asks the first in every call of a Function.
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def needs_plain(*tensors: torch.Tensor | None) -> bool:
    """
    Whether plain operations have to take the place of a Function of our own: inside transforms, and in a program that
    is exported with something to train, of which only the operators inside the Function would be kept.
    """
    return is_transformed() or (torch.compiler.is_exporting() and records_gradients(*tensors))


def is_followed(*tensors: torch.Tensor | None) -> bool:
    """
    Whether something wants to see operators: compilation, tracing, a profiler, a dispatch mode, a subclass of tensors,
    or one that is only marked as negated, as the imaginary part of a conjugate is, whose bytes are not.

    Where nothing does, a kernel can be called past PyTorch's dispatcher, which takes 20 µs for an operator in Python.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
        or any(
            type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_neg()
            for tensor in tensors
            if tensor is not None
        )
    )


def needed_gradients(
    needs: Sequence[bool],
    inputs: Sequence[torch.Tensor | None],
    compute: Callable[..., torch.Tensor],
    grad: torch.Tensor,
) -> tuple[torch.Tensor | None, ...]:
    """
    The gradients of those inputs that need one, `None` for the others, through plain operations: they can be
    differentiated again.
    """
    wanted = [index for index, is_needed in enumerate(needs) if is_needed and inputs[index] is not None]

    def of_wanted(*tensors: torch.Tensor) -> torch.Tensor:
        arguments = list(inputs)
        for index, tensor in zip(wanted, tensors, strict=True):
            arguments[index] = tensor
        return compute(*arguments)

    gradients: list[torch.Tensor | None] = [None] * len(inputs)
    if wanted:
        pull_back = torch.func.vjp(of_wanted, *(inputs[index] for index in wanted))[1]
        for index, gradient in zip(wanted, pull_back(grad), strict=True):
            gradients[index] = gradient
    return tuple(gradients)
