# SPDX-License-Identifier: Apache-2.0
"""Running a function again and again, each time killed at the next system call that changes a file.

The function runs in a forked child that is traced as a debugger does it (ptrace), all its threads included. So it is
killed inside of libraries as well, whatever language they are written in, and between any two changes of a file.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress


IS_SUPPORTED = sys.platform == "linux" and platform.machine() == "x86_64"

_TRACEME, _PEEKUSER, _SYSCALL, _SETOPTIONS = 0, 3, 24, 0x4200
_TRACE_SYSCALLS_AND_THREADS = 0x1 | 0x8 | 0x100000  # TRACESYSGOOD, TRACECLONE, EXITKILL
_WALL = 0x40000000
_NUMBER, _SECOND, _THIRD = 15 * 8, 13 * 8, 12 * 8  # orig_rax, rsi, rdx among the registers

# system calls of x86-64 that change files, whatever their arguments
_CHANGING = {
    1: "write",
    18: "pwrite64",
    20: "writev",
    74: "fsync",
    75: "fdatasync",
    76: "truncate",
    77: "ftruncate",
    82: "rename",
    83: "mkdir",
    84: "rmdir",
    85: "creat",
    86: "link",
    87: "unlink",
    88: "symlink",
    90: "chmod",
    91: "fchmod",
    258: "mkdirat",
    263: "unlinkat",
    264: "renameat",
    265: "linkat",
    285: "fallocate",
    296: "pwritev",
    316: "renameat2",
    326: "copy_file_range",
    40: "sendfile",
}
_OPEN, _OPENAT = 2, 257
_FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def run_killed_at(call: int, function: Callable[[], object]) -> str | None:
    """
    Run a function in a child process that is killed before a system call that changes a file.

    Args:
        call (`int`): Which one, counted from 1.
        function (`Callable[[], object]`): The function.

    Returns:
        `str` or `None`: The name of the system call, or `None` if the function came to its end before.

    Raises:
        RuntimeError: If the function failed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes, libc.ptrace.restype = [ctypes.c_long] * 4, ctypes.c_long
    pid = os.fork()
    if not pid:
        _be_traced(libc, function)
    os.waitpid(pid, 0)
    libc.ptrace(_SETOPTIONS, pid, 0, _TRACE_SYSCALLS_AND_THREADS)
    libc.ptrace(_SYSCALL, pid, 0, 0)
    done, entering = 0, {}
    while True:
        thread, status = os.waitpid(-1, _WALL)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            if thread != pid:
                continue
            if status:
                raise RuntimeError(f"the function failed with status {status}")
            return None
        passed_on = 0
        if os.WSTOPSIG(status) == signal.SIGTRAP | 0x80:
            entering[thread] = not entering.get(thread, False)
            name = _changing_call(libc, thread) if entering[thread] else None
            done += name is not None
            if done == call:
                os.kill(pid, signal.SIGKILL)
                _reap(pid)
                return name
        elif os.WSTOPSIG(status) not in (signal.SIGTRAP, signal.SIGSTOP):
            passed_on = os.WSTOPSIG(status)
        libc.ptrace(_SYSCALL, thread, 0, passed_on)


def kill_points(function: Callable[[], object]) -> Iterator[tuple[int, str]]:
    """
    Run a function killed at its first system call that changes a file, then at its second, and so on to its end.

    Args:
        function (`Callable[[], object]`): The function.

    Returns:
        `Iterator[tuple[int, str]]`: The number of the system call and its name, after each kill.
    """
    call = 1
    while (name := run_killed_at(call, function)) is not None:
        yield call, name
        call += 1


def _be_traced(libc: ctypes.CDLL, function: Callable[[], object]) -> None:
    code = 1
    try:
        libc.ptrace(_TRACEME, 0, 0, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        function()
        code = 0
    finally:
        os._exit(code)


def _changing_call(libc: ctypes.CDLL, thread: int) -> str | None:
    number = libc.ptrace(_PEEKUSER, thread, _NUMBER, 0)
    if number in (_OPEN, _OPENAT):
        flags = libc.ptrace(_PEEKUSER, thread, _SECOND if number == _OPEN else _THIRD, 0)
        return "open" if flags & _FOR_WRITING else None
    return _CHANGING.get(number)


def _reap(pid: int) -> None:
    """Wait for the process and the threads that were traced with it."""
    with suppress(ChildProcessError):
        while True:
            thread, status = os.waitpid(-1, _WALL)
            if thread == pid and os.WIFSIGNALED(status):
                return
