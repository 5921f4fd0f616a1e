# SPDX-License-Identifier: Apache-2.0
"""The C++ sources as a shared library, compiled on first use and kept in the user's cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch


logger = logging.getLogger(__name__)

_HERE = Path(__file__).parent
# One rounding a written operation, so that the results do not depend on the compiler: fused multiply-adds are written
# out in the source, and -ffp-contract=off leaves it at those. Without exceptions nothing of C++'s library is needed,
# which a C compiler does not link: PEFT's BOFT leaves CXX=gcc behind where it finds no CUDA.
_FLAGS = ("-std=c++17", "-fPIC", "-fopenmp", "-fno-exceptions", "-ffp-contract=off", "-Wall")
_VECTOR_FLAGS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
    "AVX2": ("-mavx2", "-mfma"),
}
# The sources of compressed weights: what each needs is chosen at run time, see `bitmask.py`. GCC's own headers make it
# warn of values that may be uninitialized.
_BITMASK_FLAGS = {
    "bitmask_portable.cpp": ("-O2",),
    "bitmask_avx2.cpp": ("-O3", "-mavx2", "-mfma", "-mf16c", "-mbmi2", "-mpopcnt"),
    "bitmask_avx512.cpp": (
        *("-O3", *_VECTOR_FLAGS["AVX512"], "-mavx512vbmi2", "-mavx512bf16", "-mf16c", "-mbmi2", "-mpopcnt"),
        "-Wno-uninitialized",
        "-Wno-maybe-uninitialized",
    ),
}
_BITMASK_TIERS = {"AVX512": 3, "AVX2": 2}
_OPENMP = re.compile(r"lib(gomp|omp|iomp5)[-.]")
_RETURN_SIZES = {"native": ("grad_B_parts",), "bitmask": ("bitmask_tier",)}


@cache
def load_library(name: str = "native") -> ctypes.CDLL | None:
    """
    Compile and load C++ sources, once a process; the library is kept, so that later processes only load it.

    The environment variable `PEFT_SPP_NATIVE=0` turns it off, `CXX` names the compiler, and `XDG_CACHE_HOME` the
    folder to keep the library in (by default `~/.cache`). `None` where it is turned off or cannot be had: off Linux,
    or without a C++ compiler. The reason is logged, and PyTorch's operations serve, more slowly. `"bitmask"` is the
    library of compressed weights.
    """
    if os.environ.get("PEFT_SPP_NATIVE", "1") == "0" or sys.platform != "linux":
        return None
    compiler = _compiler()
    if compiler is None:
        logger.info("No C++ compiler found (CXX, c++, g++, clang++): SPP's CPU kernels run in PyTorch's operations.")
        return None
    try:
        library = _loaded(_compiled(compiler, name))
    except subprocess.CalledProcessError as error:
        logger.warning("Compiling SPP's CPU kernels with %s failed: %s", compiler, error.stderr.strip())
        return None
    except OSError as error:
        logger.warning("SPP's CPU kernels, compiled with %s, could not be written or loaded: %s", compiler, error)
        return None
    for function in _RETURN_SIZES[name]:
        getattr(library, function).restype = ctypes.c_int64
    return library


def _loaded(path: Path) -> ctypes.CDLL:
    """
    Load a library that was linked without -fopenmp.

    Its symbols resolve to the OpenMP runtime that PyTorch has loaded, so that there is one pool of threads. Where that
    is of another kind than the compiler's, loading fails.
    """
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        if "undefined symbol" not in str(error):
            raise
    # PyTorch from a distribution has the system's runtime, whose symbols nobody else sees
    ctypes.CDLL(_openmp_runtime(), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(path))


def _openmp_runtime() -> str:
    """The OpenMP runtime that is in memory, or else GCC's by its name."""
    mapped = (line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines())
    return next((file for file in mapped if _OPENMP.match(Path(file).name)), "libgomp.so.1")


def _compiler() -> str | None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((found for found in map(shutil.which, names) if found), None)


def _sources(name: str) -> dict[Path, tuple[str, ...]]:
    """The files of a library, with the flags to compile each."""
    capability = torch.backends.cpu.get_cpu_capability()
    if name == "native":
        vector_flags = _VECTOR_FLAGS.get(capability, ())
        return {_HERE / file: (*_FLAGS, "-O3", *vector_flags) for file in ("native.cpp", "mask.cpp")}
    files = list(_BITMASK_FLAGS.items())[: _BITMASK_TIERS.get(capability, 1)]
    return {_HERE / file: (*_FLAGS, *flags) for file, flags in files}


def _compiled(compiler: str, name: str) -> Path:
    """The path of the library, compiled if it is not there yet."""
    sources = _sources(name)
    contents = [path.read_bytes() for path in (*sources, *sorted(_HERE.glob("*.h")))]
    # PyTorch's version stands for its OpenMP runtime
    words = [compiler, *itertools.chain(*sources.values()), torch.__version__]
    key = hashlib.sha256(b"\0".join([*contents, *map(str.encode, words)]))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft_spp"
    path = folder / f"{name}-{key.hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # made aside and renamed: several processes may start at once
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            build(compiler, sources, Path(aside) / f"{name}.so").replace(path)
    return path


def build(compiler: str, sources: Mapping[Path, Sequence[str]], library: Path) -> Path:
    """Compile files, each with its flags, and link them; the objects stay next to the library."""
    objects = {source: str(library.with_name(f"{source.stem}.o")) for source in sources}
    with ThreadPoolExecutor() as pool:
        compiling = [[compiler, *flags, "-c", str(source), "-o", objects[source]] for source, flags in sources.items()]
        list(pool.map(_run, compiling))
    _run([compiler, "-shared", *objects.values(), "-o", str(library)])
    return library


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
