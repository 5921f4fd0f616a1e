# SPDX-License-Identifier: Apache-2.0
"""Where to compute."""

from __future__ import annotations

import torch

from .error_text import message


def usable_device(device: str | torch.device | None) -> torch.device:
    """The device to compute on, once it is known to work."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
        # what PyTorch was built without, and what the machine does not have, shows in the first allocation only
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise ValueError(_refusal(device, message(error))) from error
    if found.type == "meta":
        raise ValueError(_refusal(device, "tensors on it hold no data"))
    return found


def _refusal(device: str | torch.device, reason: str) -> str:
    there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return f"device={str(device)!r} cannot be used: {reason.rstrip('.')}. This machine has {', '.join(there)}."
