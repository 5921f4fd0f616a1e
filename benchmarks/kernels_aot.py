# SPDX-License-Identifier: Apache-2.0
"""
The Triton kernels compiled ahead of time for GPUs, without one: `python -m benchmarks.kernels_aot`.

For each kernel for compressed weights and each architecture: the registers of a thread, the bytes it spills, shared
memory, how wide loads and stores are, and the instructions a thread runs for an element of the weight. Registers,
spills and instructions are read from the machine code (`cuobjdump` and `nvdisasm`, which Triton comes with), loads and
stores from the PTX. Where a loop has two branches, for tiles in one row block and for others, the instructions of both
are counted. None of this is a speed: that is not measured.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer

from peft_spp.durable import write_text
from peft_spp.functional import Factors
from peft_spp.functional.bitmask import Compressed, bitmask_bytes
from peft_spp.functional.kernels.scaled import ScaledWeight
from peft_spp.functional.kernels.triton import is_available, triton

from .harness import make_console, print_table
from .harness.options import DEFAULT_OUTPUT, QuickOption


NAME = "kernels_aot"
ARCHITECTURES = [80, 90, 100]
SHAPE = (4096, 4096)
RANK = 16
TOKENS = {torch.bfloat16: [1, 8, 16], torch.float16: [1, 8, 16], torch.float32: [1, 4, 8]}
ADAPTERS = [0, 1, 2]
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


def widths(ptx: str) -> tuple[dict[str, int], dict[str, int]]:
    """
    How many loads and stores of global memory the PTX has, by the bytes each moves for a thread.

    Args:
        ptx (`str`): The PTX.

    Returns:
        `tuple[dict[str, int], dict[str, int]]`: The numbers of loads, copies to shared memory included, and of stores,
        by bytes, narrow ones first.
    """
    copies = [int(size, 16) for size in re.findall(r"\bcp\.async\.\S*global [^,]*, [^,]*, (0x\w+)", ptx)]
    found = []
    for instruction, sizes in (("ld", copies), ("st", [])):
        pattern = rf"\b{instruction}\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\s"
        counts = Counter([*sizes, *(int(v or 1) * int(bits) // 8 for v, bits in re.findall(pattern, ptx))])
        found.append({str(size): counts[size] for size in sorted(counts)})
    return found[0], found[1]


def instructions_in_loop(sass: str) -> int:
    """The instructions of the longest loop in a disassembly, those of all its branches together."""
    labels: dict[str, int] = {}
    count = longest = 0
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = count
        elif re.search(r"/\*[0-9a-f]{4,}\*/\s+\S", line):
            count += 1
            if (branch := re.search(r"\bBRA\b.*(\.L_x_\d+)", line)) and branch[1] in labels:
                longest = max(longest, count - labels[branch[1]])
    return longest


def resources(compiled: Any) -> dict[str, Any]:
    """
    What a compiled kernel takes of a multiprocessor.

    Args:
        compiled (`triton.compiler.CompiledKernel`): The kernel.

    Returns:
        `dict`: Registers a thread, bytes of local memory (spills), bytes of shared memory, threads, the numbers of
        loads and stores by width, and the instructions of the loop.
    """
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output_of(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        sass = _output_of(knobs.nvidia.nvdisasm.path, "-c", file.name)
    loads, stores = widths(compiled.asm["ptx"])
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return {
        "registers": int(found["REG"]),
        "spilled_bytes": int(found["STACK"]) + int(found["LOCAL"]),
        "shared_bytes": int(compiled.metadata.shared),
        "threads": 32 * compiled.metadata.num_warps,
        "loads_by_bytes": loads,
        "stores_by_bytes": stores,
        "instructions_in_loop": instructions_in_loop(sass),
    }


def _output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@app.command()
def main(
    output: Annotated[Path, typer.Option(help="The file of the result.")] = DEFAULT_OUTPUT / f"{NAME}.json",
    quick: QuickOption = False,
) -> None:
    """Compile the Triton kernels for compressed weights for several GPUs, and write what they take."""
    if not is_available():
        raise typer.BadParameter("This benchmark needs Triton 3.3 or newer. Install it with: pip install triton")
    import triton as library

    cases = []
    for dtype in list(TOKENS)[:1] if quick else TOKENS:
        for adapters in [0] if quick else ADAPTERS:
            for architecture in ARCHITECTURES[:1] if quick else ARCHITECTURES:
                for name, launch in launches_of(dtype, adapters).items():
                    kernel, args, kwargs = launch
                    tile_bytes = kwargs["ROWS"] * kwargs["BYTES"]
                    found = resources(compile_launch(kernel, args, kwargs, architecture))
                    per_thread = 8 * tile_bytes // found["threads"]
                    found["instructions_per_element"] = round(found["instructions_in_loop"] / per_thread, 1)
                    parameters = {
                        "kernel": name,
                        "dtype": str(dtype).removeprefix("torch."),
                        "adapters": adapters,
                        "architecture": f"sm_{architecture}",
                        "tile": [kwargs["ROWS"], 8 * kwargs["BYTES"]],
                    }
                    cases.append(parameters | found)
    settings = {"shape": list(SHAPE), "r": RANK, "triton": library.__version__, "speed": "not measured"}
    content = {"benchmark": NAME, "command": f"python -m benchmarks.{NAME}", "settings": settings, "cases": cases}
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, _one_case_a_line(content))
    report(cases)
    make_console().print(f"Written: {output}")


def _one_case_a_line(content: dict[str, Any]) -> str:
    marked = json.dumps(content | {"cases": []}, indent=1)
    lines = ",\n".join(f"  {json.dumps(case)}" for case in content["cases"])
    return marked.replace('"cases": []', f'"cases": [\n{lines}\n ]') + "\n"


def launches_of(dtype: torch.dtype, adapters: int) -> dict[str, Launch]:
    """
    The launches of every kernel for a compressed weight of `SHAPE`.

    Args:
        dtype (`torch.dtype`): Of the weight and of x; the factors are float32.
        adapters (`int`): How many adapters there are.

    Returns:
        `dict[str, Launch]`: The launches by name: W', and y of so many tokens.
    """
    m, n = SHAPE
    bitmask = torch.empty(m, bitmask_bytes(n), dtype=torch.uint8)
    weight = Compressed(torch.empty(0, dtype=dtype), bitmask, torch.empty(m + 1, dtype=torch.int64), n)
    factors = [Factors(torch.empty(RANK, n), torch.empty(m, 1), 2.0) for _ in range(adapters)]
    w = ScaledWeight(weight, factors, True, dtype)
    with recorded_launches() as launches:
        triton.compressed_weight(w)
        for tokens in TOKENS[dtype]:
            triton.compressed_linear(torch.empty(tokens, n, dtype=dtype), w, None)
    return dict(zip(["expand", *(f"{tokens} tokens" for tokens in TOKENS[dtype])], launches, strict=True))


def report(cases: list[dict[str, Any]]) -> None:
    """Print the result as a table."""
    rows = [
        [
            f"{case['kernel']}, {case['adapters']} adapters",
            case["dtype"],
            case["architecture"],
            str(case["registers"]),
            str(case["spilled_bytes"]),
            ", ".join(f"{count}×{size}" for size, count in case["loads_by_bytes"].items()),
            str(case["instructions_per_element"]),
        ]
        for case in cases
    ]
    header = ["kernel", "dtype", "GPU", "registers", "spilled bytes", "loads × bytes", "instructions an element"]
    print_table(make_console(), header, rows, numbers_from=3)


if __name__ == "__main__":
    app()
