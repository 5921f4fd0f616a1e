# SPDX-License-Identifier: Apache-2.0
"""The C++ sources as a shared library, compiled on first use and kept in the user's cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch


logger = logging.getLogger(__name__)

_SOURCES = tuple(Path(__file__).with_name(name) for name in ("native.cpp", "mask.cpp"))
# One rounding a written operation, so that the results do not depend on the compiler: fused multiply-adds are written
# out in the source, and -ffp-contract=off leaves it at those.
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=off", "-Wall")
_VECTOR_FLAGS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
    "AVX2": ("-mavx2", "-mfma"),
}


@cache
def load_library() -> ctypes.CDLL | None:
    """
    Compile and load the C++ sources, once a process; the library is kept, so that later processes only load it.

    The environment variable `PEFT_SPP_NATIVE=0` turns it off, `CXX` names the compiler, and `XDG_CACHE_HOME` the
    folder to keep the library in (by default `~/.cache`).

    Returns:
        `ctypes.CDLL`, or `None` where it is turned off or cannot be had: off Linux, or without a C++ compiler. The
        reason is logged. Results are then computed with PyTorch's operations, more slowly.
    """
    if os.environ.get("PEFT_SPP_NATIVE", "1") == "0" or sys.platform != "linux":
        return None
    compiler = _compiler()
    if compiler is None:
        logger.info("No C++ compiler found (CXX, c++, g++, clang++): SPP's CPU kernels run in PyTorch's operations.")
        return None
    try:
        path = _compiled(compiler)
        # -fopenmp is left out when linking: the symbols resolve to the OpenMP runtime that PyTorch has loaded, so that
        # there is one pool of threads. Where that is another one than the compiler's, loading fails here.
        library = ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as error:
        logger.warning("Compiling SPP's CPU kernels with %s failed: %s", compiler, error.stderr.strip())
        return None
    except OSError as error:
        logger.warning("SPP's CPU kernels, compiled with %s, could not be written or loaded: %s", compiler, error)
        return None
    library.grad_B_parts.restype = ctypes.c_int64
    return library


def _compiler() -> str | None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((found for found in map(shutil.which, names) if found), None)


def _compiled(compiler: str) -> Path:
    """The path of the library, compiled if it is not there yet."""
    capability = torch.backends.cpu.get_cpu_capability()
    flags = [*_FLAGS, *_VECTOR_FLAGS.get(capability, ())]
    sources = [source.read_bytes() for source in _SOURCES]
    # PyTorch's version stands for its OpenMP runtime
    key = hashlib.sha256(b"\0".join([*sources, compiler.encode(), *map(str.encode, [*flags, torch.__version__])]))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft_spp"
    path = folder / f"native-{key.hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # made aside and renamed: several processes may start at once
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            objects = {source: str(Path(aside) / f"{source.stem}.o") for source in _SOURCES}
            library = Path(aside) / "native.so"
            for command in (
                *([compiler, *flags, "-c", str(source), "-o", made] for source, made in objects.items()),
                [compiler, "-shared", *objects.values(), "-o", str(library)],
            ):
                subprocess.run(command, check=True, capture_output=True, text=True)
            library.replace(path)
    return path
