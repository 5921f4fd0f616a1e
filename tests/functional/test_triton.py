# SPDX-License-Identifier: Apache-2.0
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from peft_spp.functional import Factors
from peft_spp.functional.kernels.scaled import ScaledWeight
from peft_spp.functional.kernels.triton import is_available, triton


needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

KERNELS = ["scaled_weight_kernel", "partial_gradients_kernel", "sum_partial_gradients_kernel"]


@needs_triton
def test_the_kernels_compute_the_formula():
    """The interpreter is chosen when Triton is first imported, by whatever library that is: hence the process."""
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    cases = Path(__file__).with_name("triton_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", str(cases)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=cases.parents[2])
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("ranks", [[16], [16, 3, 256, 1]])
def test_the_kernels_compile_for_a_gpu_and_move_the_weight_by_16_bytes(
    monkeypatch, tmp_path, dtype, transposed, ranks
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    m, n = 256, 512
    weight = torch.empty(n, m, dtype=dtype).t() if transposed else torch.empty(m, n, dtype=dtype)
    factors = [Factors(torch.empty(r, n), torch.empty(m, 1), 2.0) for r in ranks]

    scaled, gradients, total = launches(
        monkeypatch,
        lambda: triton.scaled_weight(ScaledWeight(weight, factors, True, dtype)),
        lambda: triton.factor_gradients(weight, weight, factors),
    )
    ptx = compile_for_gpu(*scaled)
    vectors = 8192 // (16 * 128)  # of a tile of the weight, for each of 128 threads
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) >= vectors
    assert len(re.findall(r"st\.global\S*\.v4\.b32", ptx)) >= vectors

    vectors = 2 * 64 * 64 * dtype.itemsize // (16 * 128)
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", compile_for_gpu(*gradients))) >= vectors
    compile_for_gpu(*total)


def test_without_triton_it_is_not_available(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert not is_available.__wrapped__()


@needs_triton
@pytest.mark.parametrize(("version", "expected"), [("3.2.0", False), ("3.3.0", True), ("3.10.0+git1a2b3c", True)])
def test_it_is_available_from_the_first_version_that_can_compile_it(monkeypatch, version, expected):
    monkeypatch.setattr("triton.__version__", version)
    assert is_available.__wrapped__() is expected


def test_the_package_imports_without_triton():
    code = "import sys; sys.modules['triton'] = None; import peft_spp.functional"
    subprocess.run([sys.executable, "-c", code], check=True)


def launches(monkeypatch, *calls):
    """The kernels that the calls launch, with their arguments, launching none."""
    from peft_spp.functional.kernels import triton_kernels

    recorded = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **kwargs: recorded.append((self.kernel, args, kwargs))

    for name in KERNELS:
        monkeypatch.setattr(triton_kernels, name, Recorder(getattr(triton_kernels, name)))
    for call in calls:
        call()
    return recorded


def compile_for_gpu(kernel, args, kwargs):
    """The PTX of a kernel for an H100, compiled down to machine code, specialized to its arguments as a launch is."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import mangle_type

    options = {"num_warps": kwargs.pop("num_warps")}
    constants, attributes = dict(kwargs), {}

    def describe(path, arg):
        if isinstance(arg, tuple):
            return tuple(describe((*path, i), item) for i, item in enumerate(arg))
        if isinstance(arg, int) and arg == 1:
            constants[path] = 1
            return "constexpr"
        if isinstance(arg, torch.Tensor) or (isinstance(arg, int) and arg % 16 == 0):
            attributes[path] = [["tt.divisibility", 16]]
        return mangle_type(arg)

    signature = {name: describe((i,), arg) for i, (name, arg) in enumerate(zip(kernel.arg_names, args, strict=False))}
    signature |= dict.fromkeys(kwargs, "constexpr")
    source = ASTSource(kernel, signature, constants, attributes)
    return compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
