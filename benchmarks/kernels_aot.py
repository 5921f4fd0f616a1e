# SPDX-License-Identifier: Apache-2.0
"""
The Triton kernels compiled ahead of time for GPUs, without one: `python -m benchmarks.kernels_aot`.

For each kernel for compressed weights and each architecture: the registers a thread has, the bytes it spills, shared
memory, and how wide its loads and stores are. Registers, spills and shared memory are what `cuobjdump` finds in the
machine code; loads and stores are counted in the PTX. It says nothing about speed, which is not measured.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import typer


NAME = "kernels_aot"
ARCHITECTURES = [80, 90, 100]
SHAPE = (4096, 4096)
RANK = 16
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
KERNELS = {
    "triton_kernels": ["scaled_weight_kernel", "partial_gradients_kernel", "sum_partial_gradients_kernel"],
    "triton_bitmask": ["expanded_weight_kernel", "few_tokens_kernel"],
}

app = typer.Typer(add_completion=False)

Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


class Recorder:
    """A kernel that notes its launches instead of running."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """The kernels that are launched inside, with their arguments; none of them runs."""
    from peft_spp.functional.kernels import triton_bitmask, triton_kernels

    launches: list[Launch] = []
    with ExitStack() as stack:
        for module in (triton_kernels, triton_bitmask):
            for name in KERNELS[module.__name__.rpartition(".")[2]]:
                stack.enter_context(patch.object(module, name, Recorder(getattr(module, name), launches)))
        yield launches


def compile_launch(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], architecture: int = 90) -> Any:
    """
    Compile a kernel down to machine code, specialized to its arguments as a launch is.

    Args:
        kernel (`triton.JITFunction`): The kernel.
        args (`tuple`): Its arguments.
        kwargs (`dict`): Its constants, and `num_warps`.
        architecture (`int`): The compute capability, such as 90 for an H100.

    Returns:
        `triton.compiler.CompiledKernel`: With the PTX and the machine code in `asm`.
    """
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import mangle_type

    constants: dict[Any, Any] = {name: value for name, value in kwargs.items() if name != "num_warps"}
    attributes = {}

    def describe(path: tuple[int, ...], arg: Any) -> Any:
        if isinstance(arg, tuple):
            return tuple(describe((*path, i), item) for i, item in enumerate(arg))
        if arg is None or (isinstance(arg, int) and arg == 1):
            constants[path] = arg
            return "constexpr"
        if isinstance(arg, torch.Tensor) or (isinstance(arg, int) and arg % 16 == 0):
            attributes[path] = [["tt.divisibility", 16]]
        return mangle_type(arg)

    signature = {name: describe((i,), arg) for i, (name, arg) in enumerate(zip(kernel.arg_names, args, strict=False))}
    signature |= {name: "constexpr" for name in kwargs if name != "num_warps"}
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": kwargs["num_warps"]}
    return compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def widths(ptx: str, instruction: str) -> dict[str, int]:
    """
    How many loads or stores of global memory the PTX has, by the bytes each moves for a thread.

    Args:
        ptx (`str`): The PTX.
        instruction (`str`): `"ld"` or `"st"`.

    Returns:
        `dict[str, int]`: The number of instructions by bytes, narrow ones first.
    """
    pattern = rf"\b{instruction}\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\s"
    found = Counter(int(vector or 1) * int(bits) // 8 for vector, bits in re.findall(pattern, ptx))
    return {str(size): found[size] for size in sorted(found)}


def resources(compiled: Any) -> dict[str, Any]:
    """
    What a compiled kernel takes of a multiprocessor.

    Args:
        compiled (`triton.compiler.CompiledKernel`): The kernel.

    Returns:
        `dict`: Registers a thread, bytes of local memory (spills), bytes of shared memory, threads, and the numbers of
        loads and stores by width.
    """
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(Path(knobs.nvidia.cuobjdump.path)), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage))
    return {
        "registers": int(found["REG"]),
        "spilled_bytes": int(found["STACK"]) + int(found["LOCAL"]),
        "shared_bytes": int(compiled.metadata.shared),
        "threads": 32 * compiled.metadata.num_warps,
        "loads_by_bytes": widths(compiled.asm["ptx"], "ld"),
        "stores_by_bytes": widths(compiled.asm["ptx"], "st"),
    }
