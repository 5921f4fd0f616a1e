# SPDX-License-Identifier: Apache-2.0
"""What a result depends on besides the code: machine, versions, commit, threads, command."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch


_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "peft", "transformers", "accelerate", "numpy", "peft-spp")
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def describe_environment(device: torch.device) -> dict[str, Any]:
    """
    Describe where and how a benchmark runs.

    Args:
        device (`torch.device`): The device that is measured.

    Returns:
        `dict[str, Any]`: Ready for JSON: `date`, `command`, `git`, `hardware`, `os`, `versions`, `threads` and
            `float32_matmul_precision`.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "git": _git_state(),
        "hardware": _hardware(device),
        "os": _operating_system(),
        "versions": _versions(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "threads": {
            "torch": torch.get_num_threads(),
            "torch_interop": torch.get_num_interop_threads(),
            **{name: os.environ.get(name) for name in _THREAD_VARIABLES},
        },
    }


def machine_slug(device: torch.device) -> str:
    """A folder name for the machine: the name of its GPU where that is measured, of its CPU otherwise."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown-machine"


def cpu_name() -> str:
    """The model name of the CPU, as the operating system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if match:
            return match[1].strip()
    if sys.platform == "darwin":
        return _output_of("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine()


def _hardware(device: torch.device) -> dict[str, Any]:
    hardware: dict[str, Any] = {
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores_used": _usable_cores(),
        "caches": _caches(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hardware["gpu"] = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return hardware


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _caches() -> dict[str, str]:
    """The caches that the first core sees, such as `{"L3 Unified": "32768K"}`; empty where Linux does not tell."""
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        caches[f"L{level} {kind}"] = size
    return caches


def _operating_system() -> str:
    if sys.platform == "linux":
        try:
            distribution = platform.freedesktop_os_release()["PRETTY_NAME"]
            return f"{distribution}, Linux {platform.release().partition('-')[0]}"
        except OSError:
            pass  # no os-release file: the general description below
    return platform.platform()


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def _git_state() -> dict[str, Any]:
    changes = _output_of("git", "status", "--porcelain", "--untracked-files=no")
    return {
        "commit": _output_of("git", "rev-parse", "HEAD"),
        "changed_files": None if changes is None else [line[3:] for line in changes.splitlines()],
    }


def _output_of(*command: str) -> str | None:
    """The output of a command in the repository, without the newline at its end, or `None` where it does not work."""
    try:
        return subprocess.run(command, cwd=_ROOT, check=True, capture_output=True, text=True).stdout.rstrip()
    except (OSError, subprocess.CalledProcessError):
        return None
