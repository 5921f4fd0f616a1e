# SPDX-License-Identifier: Apache-2.0
"""What the autograd Functions have in common."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def autocast_off(device_type: str) -> AbstractContextManager[Any]:
    """A context without autocast, which would cast float32 products of small factors again.

    Args:
        device_type (`str`): The type of the device that is computed on, such as `"cuda"`.

    Returns:
        `AbstractContextManager`: The context; one that does nothing where autocast is off.
    """
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def records_gradients(*tensors: torch.Tensor | None) -> bool:
    """
    Whether autograd records what is computed from these tensors.

    Where it does not, a Function that saves tensors is of no use, and the compiler cannot trace it.

    Args:
        tensors (`torch.Tensor`, *optional*): The inputs.

    Returns:
        `bool`: Whether gradients are on and one of the inputs needs one.
    """
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def halves(tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """A and B of each adapter, out of all A followed by all B."""
    return list(tensors[: len(tensors) // 2]), list(tensors[len(tensors) // 2 :])


def needed_gradients(
    needs: Sequence[bool], inputs: Sequence[torch.Tensor | None], output: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """
    The gradients of the inputs of a Function that need one, such that they can be differentiated again.

    Args:
        needs (`Sequence[bool]`): Whether each input needs a gradient.
        inputs (`Sequence[torch.Tensor | None]`): The inputs, `None` in place of those that are no tensors.
        output (`torch.Tensor`): The output, computed from them by plain operations.
        grad (`torch.Tensor`): The gradient of the output.

    Returns:
        `tuple[torch.Tensor | None, ...]`: A gradient or `None` for each input.
    """
    wanted = [t for t, is_needed in zip(inputs, needs, strict=True) if is_needed and t is not None]
    grads = iter(torch.autograd.grad(output, wanted, grad, create_graph=True))
    return tuple(
        next(grads) if is_needed and t is not None else None for t, is_needed in zip(inputs, needs, strict=True)
    )
