# SPDX-License-Identifier: Apache-2.0
"""Memory that tensors take: what a model holds, what a graph keeps for backward, what a call takes at its peak."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile


Result = TypeVar("Result")


@dataclass(frozen=True)
class MemoryTrace(Generic[Result]):
    """How the memory of tensors went during a call, in bytes above the level before it.

    Args:
        result: What the call returned.
        peak (`int`): The highest level during the call.
        end (`int`): The level at its end, with the result alive.
    """

    result: Result
    peak: int
    end: int


@dataclass
class SavedTensors:
    """Distinct storages that autograd keeps for the backward pass, their bytes by address."""

    storages: dict[int, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Their bytes altogether."""
        return sum(self.storages.values())


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """The bytes of the distinct storages of tensors."""
    return sum(_storages(tensors).values())


@contextmanager
def record_saved_tensors(excluded: Iterable[torch.Tensor]) -> Iterator[SavedTensors]:
    """
    Record what operations inside save for their backward pass, custom autograd Functions among them.

    Tensors that share a storage count once, with the whole storage. The graph must stay alive inside the context, or a
    storage that it has freed could give its address to another one.

    Args:
        excluded (`Iterable[torch.Tensor]`): Tensors whose storages do not count: the model's parameters and buffers.

    Yields:
        `SavedTensors`: What has been saved so far.
    """
    own = _storages(excluded)
    saved = SavedTensors()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.storages.update({address: size for address, size in _storages([tensor]).items() if address not in own})
        # the same tensor would make a reference cycle where an operation saves its own output
        return tensor.detach()

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def trace_memory(run: Callable[[], Result], device: torch.device) -> MemoryTrace[Result]:
    """
    Follow the memory of tensors during a call.

    On CUDA the caching allocator's own counters are read: all allocations of tensors and of the workspaces that
    PyTorch gives to libraries, not rounded up to the allocator's segments. On CPU PyTorch's profiler records every
    allocation and release of PyTorch's allocator with its bytes, and the running total of these is exact. Not in it:
    memory that MKL and oneDNN allocate by themselves, and releases of what was allocated before the call, of which
    there should be none.

    Args:
        run (`Callable[[], Result]`): The call.
        device (`torch.device`): Where it allocates.

    Returns:
        `MemoryTrace`: Its result, its peak and its end.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = run()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        return MemoryTrace(result, peak, torch.cuda.memory_allocated(device) - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    level = peak = 0
    for change in _cpu_allocations(profiler):
        level += change
        peak = max(peak, level)
    return MemoryTrace(result, peak, level)


def _cpu_allocations(profiler: profile) -> list[int]:
    """The bytes of every allocation, and of every release as a negative number, in the order of time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [event for event in events if event["name"] == "[memory]" and event["args"]["Device Type"] == 0]
    return [event["args"]["Bytes"] for event in sorted(changes, key=lambda event: event["ts"])]


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes() > 0}
