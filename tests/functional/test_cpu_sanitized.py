# SPDX-License-Identifier: Apache-2.0
"""The tests of the C++ sources once more, with every access to memory checked by the compiler's sanitizers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from peft_spp.native import library


TESTS = Path(__file__).parents[1]
# the flags come last, for compiling and for linking: optimization would hide some accesses
COMPILER = """#!/bin/sh
exec {compiler} "$@" -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined
"""


def runtimes(compiler):
    """The sanitizers' own libraries, which have to be loaded before Python; GCC tells where they are."""
    for name in ("libasan.so", "libubsan.so"):
        told = subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=False
        ).stdout
        if not os.path.isabs(told.strip()):
            pytest.skip(f"the compiler has no {name}")
        yield told.strip()


MASKS = ["sparsity/test_mask_fingerprint.py", "sparsity/test_mask_record.py"]
NATIVE = (["functional/test_cpu_native.py", *MASKS], "native and not without_a_compiler")
BITMASK = (["functional/test_bitmask_kernels.py", "functional/test_bitmask_tokens.py"], "not lesser_processors")


@pytest.mark.slow
@pytest.mark.skipif(library.load_library() is None, reason="no C++ compiler that works with this PyTorch")
@pytest.mark.parametrize(
    ("files", "names", "capability"),
    [(*NATIVE, None), (*BITMASK, None), (*BITMASK, "avx2"), (*BITMASK, "default")],
    ids=["native", "bitmask", "bitmask-avx2", "bitmask-portable"],
)
def test_no_access_is_out_of_bounds(tmp_path, files, names, capability):
    plain = library._compiler()
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes(plain)),
        # Python frees little at its end
        "ASAN_OPTIONS": f"detect_leaks=0:detect_odr_violation=0:log_path={tmp_path / 'report'}",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "XDG_CACHE_HOME": str(tmp_path),
        "CXX": str(tmp_path / "compiler"),
        **({} if capability is None else {"ATEN_CPU_CAPABILITY": capability}),
    }
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER.format(compiler=plain))
    compiler.chmod(0o755)
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-x", "-s", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, "-k", names, *(str(TESTS / file) for file in files)],
        env=environment,
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    reports = "\n".join(report.read_text() for report in tmp_path.glob("report*"))
    assert result.returncode == 0 and not reports, reports or result.stdout + result.stderr
    made = sorted(tmp_path.glob("peft_spp/*.so"))
    wanted = {"native"} if "native" in names else {"bitmask", "native"}
    assert wanted <= {path.name.split("-")[0] for path in made}
    assert all(b"__asan_" in path.read_bytes() for path in made)
    assert "passed" in result.stdout
