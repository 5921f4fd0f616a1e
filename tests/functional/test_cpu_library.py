# SPDX-License-Identifier: Apache-2.0
"""How the C++ sources become a library: with a compiler that notes what it is asked for, and writes a file."""

import ctypes
import logging
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peft_spp.native import library


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="compiled on Linux only")

NOTES = """#!/bin/sh
echo "$@" >> {log}
while [ "$1" != -o ]; do shift; done
echo compiled > "$2"
"""
FAILS = """#!/bin/sh
echo "it is broken" >&2
exit 1
"""

load = library.load_library.__wrapped__


def script(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PEFT_SPP_NATIVE", raising=False)
    noting = script(tmp_path / "compiler", NOTES.format(log=tmp_path / "log"))
    monkeypatch.setenv("CXX", noting)
    return noting


def asked_for(tmp_path):
    log = tmp_path / "log"
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


@pytest.mark.parametrize("name", ["native", "bitmask"])
def test_each_source_is_compiled_and_all_are_linked(tmp_path, compiler, name):
    order = {path: index for index, path in enumerate(library._sources(name))}
    path = library._compiled(compiler, name)
    *compiling, linking = asked_for(tmp_path)
    # side by side, in any order
    compiling.sort(key=lambda arguments: order[Path(arguments[arguments.index("-c") + 1])])
    assert [Path(arguments[arguments.index("-c") + 1]) for arguments in compiling] == list(order)
    made = [arguments[arguments.index("-o") + 1] for arguments in compiling]
    for arguments, flags in zip(compiling, library._sources(name).values(), strict=True):
        assert {*library._FLAGS, *flags} <= set(arguments)
    # aside, on the same file system
    assert {Path(file).parent.parent for file in made} == {path.parent}
    assert linking[:-2] == ["-shared", *made] and len(set(made)) == len(order)
    assert path.parent == tmp_path / "cache" / "peft_spp" and path.read_text() == "compiled\n"
    assert path.name.startswith(f"{name}-") and path.suffix == ".so"
    assert list(path.parent.iterdir()) == [path]
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_it_is_compiled_once(tmp_path, compiler):
    path = library._compiled(compiler, "native")
    before = asked_for(tmp_path)
    assert library._compiled(compiler, "native") == path and asked_for(tmp_path) == before


@pytest.mark.parametrize("name", ["native", "bitmask"])
def test_another_compiler_processor_source_or_pytorch_has_a_library_of_its_own(tmp_path, compiler, monkeypatch, name):
    paths = {library._compiled(compiler, name)}
    paths.add(library._compiled(script(tmp_path / "other", NOTES.format(log=tmp_path / "log")), name))
    for capability in ("DEFAULT", "AVX2", "AVX512"):
        with monkeypatch.context() as patch:
            patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
            paths.add(library._compiled(compiler, name))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "0.0")
        paths.add(library._compiled(compiler, name))
    here = tmp_path / "sources"
    here.mkdir()
    for path in (*library._HERE.glob("*.cpp"), *library._HERE.glob("*.h")):
        (here / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(library, "_HERE", here)
    before = len(paths)
    paths.add(library._compiled(compiler, name))
    assert len(paths) == before  # wherever the package is
    for changed in (next(iter(library._sources(name))), here / "elements.h"):
        changed.write_text("int x;")
        paths.add(library._compiled(compiler, name))
    # this processor has one of the three capabilities, or another one
    assert len(paths) in (7, 8)


def test_only_the_files_that_the_processor_can_run_are_compiled(monkeypatch):
    for capability, files in (("DEFAULT", 1), ("AVX2", 2), ("AVX512", 3)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        names = ["bitmask_portable.cpp", "bitmask_avx2.cpp", "bitmask_avx512.cpp"][:files]
        assert [path.name for path in library._sources("bitmask")] == names


def test_by_default_it_is_kept_below_the_home_folder(tmp_path, compiler, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for unset in (True, False):
        if unset:
            monkeypatch.delenv("XDG_CACHE_HOME")
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", "")
        assert library._compiled(compiler, "native").parent == tmp_path / "home" / ".cache" / "peft_spp"


def test_compilers_are_looked_for_in_this_order(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert library._compiler() is None
    for name in ("clang++", "g++", "c++"):
        found = script(tmp_path / name, FAILS)
        assert library._compiler() == found
    mine = script(tmp_path / "mine", FAILS)
    monkeypatch.setenv("CXX", "mine")
    assert library._compiler() == mine
    monkeypatch.setenv("CXX", "not-there")
    assert library._compiler() is None
    monkeypatch.setenv("CXX", "")
    assert library._compiler() == str(tmp_path / "c++")


def test_it_can_be_turned_off_and_is_off_elsewhere(tmp_path, compiler, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("PEFT_SPP_NATIVE", "0")
        assert load() is None
    monkeypatch.setattr(sys, "platform", "darwin")
    assert load() is None
    assert asked_for(tmp_path) == []


def test_where_it_cannot_be_had_the_reason_is_logged(tmp_path, compiler, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger=library.logger.name)
    assert load() is None  # what the compiler above writes is no library
    script(tmp_path / "compiler", FAILS)
    monkeypatch.setattr(torch, "__version__", "0.0")
    assert load() is None
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    assert load() is None
    monkeypatch.setenv("CXX", "not-there")
    assert load() is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 3 + [logging.INFO]
    assert all(compiler in record.getMessage() for record in caplog.records[:3])
    assert "it is broken" in caplog.records[1].getMessage()
    assert not [path for path in (tmp_path / "cache" / "peft_spp").iterdir() if path.is_dir()]  # left of what failed


@pytest.mark.skipif(library.load_library() is None, reason="no C++ compiler that works with this PyTorch")
def test_a_library_that_is_loaded_returns_sizes_as_such():
    assert library.load_library().grad_B_parts.restype is ctypes.c_int64


HIDDEN_OPENMP = """
import ctypes
whole = ctypes.CDLL
def local(name, *args, **named):
    # what makes the symbols of PyTorch's own runtime visible, which a distribution's does not have
    return whole(name) if "libtorch_global_deps" in str(name) else whole(name, *args, **named)
ctypes.CDLL = local
import torch
ctypes.CDLL = whole
try:
    whole(None).omp_get_thread_num
except AttributeError:
    print("hidden")
from pathlib import Path
from peft_spp.native.library import load_library
def mapped():
    names = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    return {name for name in names if "omp" in name}
before = mapped()
print(load_library() is not None, load_library("bitmask") is not None, mapped() - before)
"""


@pytest.mark.skipif(library.load_library() is None, reason="no C++ compiler that works with this PyTorch")
def test_the_runtime_that_pytorch_has_loaded_serves_where_its_symbols_are_hidden():
    command = [sys.executable, "-c", HIDDEN_OPENMP]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[:2] == ["hidden", "True True set()"], result.stderr


@pytest.mark.skipif(library.load_library() is None or shutil.which("gcc") is None, reason="needs both compilers")
def test_a_c_compiler_is_enough(tmp_path):
    """PEFT's BOFT leaves CXX=gcc behind in a process where it finds no CUDA."""
    environment = {**os.environ, "CXX": "gcc", "XDG_CACHE_HOME": str(tmp_path)}
    tell = "from peft_spp.native.library import load_library as load; print(load(), load('bitmask'))"
    result = subprocess.run([sys.executable, "-c", tell], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.count("<CDLL") == 2, result.stderr


def test_without_a_runtime_in_memory_it_is_that_of_gcc(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda self: "7f00-7f01 r-xp 00000000 fe:01 12   /usr/lib/libc.so.6\n")
    assert library._openmp_runtime() == "libgomp.so.1"
    lines = "7f00-7f01 r-xp 00000000 fe:01 12   /a path/libgomp-a34b3233.so.1\n"
    monkeypatch.setattr(Path, "read_text", lambda self: f"7f00-7f01 rw-p 00000000 00:00 0\n{lines}")
    assert library._openmp_runtime() == "/a path/libgomp-a34b3233.so.1"
