# SPDX-License-Identifier: Apache-2.0
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks.kernels_aot import compile_launch, launches_of, recorded_launches, resources
from peft_spp.functional import Factors
from peft_spp.functional.kernels.scaled import ScaledWeight
from peft_spp.functional.kernels.triton import is_available, triton


needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
@pytest.mark.parametrize("marker", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_kernels_compute_the_formula(marker):
    """The interpreter is chosen when Triton is first imported, by whatever library that is: hence the process."""
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    folder = Path(__file__).parent
    cases = [str(folder / name) for name in ("triton_cases.py", "triton_bitmask_cases.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-m", marker, *cases]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder.parents[1])
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

    with recorded_launches() as launches:
        triton.scaled_weight(ScaledWeight(weight, factors, True, dtype))
        triton.factor_gradients(weight, weight, factors)
    scaled, gradients, total = launches
    ptx = compile_launch(*scaled).asm["ptx"]
    vectors = 8192 // (16 * 128)  # of a tile of the weight, for each of 128 threads
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) >= vectors
    assert len(re.findall(r"st\.global\S*\.v4\.b32", ptx)) >= vectors

    vectors = 2 * 64 * 64 * dtype.itemsize // (16 * 128)
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", compile_launch(*gradients).asm["ptx"])) >= vectors
    compile_launch(*total)


@needs_triton
@pytest.mark.parametrize("adapters", [0, 1])
@pytest.mark.parametrize("name", ["expand", "1 tokens", "8 tokens"])
@pytest.mark.parametrize("architecture", [90, *(pytest.param(n, marks=pytest.mark.slow) for n in (80, 100))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_the_kernels_for_compressed_weights_compile_and_load_each_stored_value_alone(
    monkeypatch, tmp_path, dtype, architecture, name, adapters
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, args, kwargs = launches_of(dtype, adapters)[name]
    compiled = compile_launch(kernel, args, kwargs, architecture)
    found = resources(compiled)
    elements = 8 * kwargs["ROWS"] * kwargs["BYTES"] // found["threads"]
    assert found["loads_by_bytes"][str(dtype.itemsize)] >= elements
    # x, the bitmask or factors
    assert max(int(size) for size in found["loads_by_bytes"]) >= 8
    if name == "expand":
        assert found["stores_by_bytes"] == {"16": elements * dtype.itemsize // 16}
    assert found["registers"] < 255 and found["spilled_bytes"] <= 16
    assert found["instructions_in_loop"] > elements


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
