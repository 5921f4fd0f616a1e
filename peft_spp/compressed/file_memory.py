# SPDX-License-Identifier: Apache-2.0
"""
Giving back the memory of files that are mapped.

The loader maps files into memory. What has been read of them counts as memory of the process until the system is short
of it, although nothing needs it: at the end it would be the dense model, next to the compressed one.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable, Sequence

from torch import Tensor

from ..functional.bitmask import Compressed
from ..functional.compressed import compress


_PAGE_OUT = 21
"""MADV_PAGEOUT of Linux: give pages back without losing what is in them."""

# Giving back takes 1.9 ms, and an expert of 768×2048 is compressed in 3.5 ms: so it is done once for so many bytes.
_READ_BYTES = 1 << 26


def page_out(files: Iterable[str | os.PathLike[str]]) -> None:
    """Give back the memory that mapped files take. They are read again where they are needed. Only on Linux."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # and what was only needed to compress the last weight
    wanted = {os.path.realpath(file) for file in files}
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            # address, permissions, offset, device, inode, path
            fields = line.rstrip("\n").split(maxsplit=5)
            if len(fields) == 6 and fields[5] in wanted:
                start, stop = (int(address, 16) for address in fields[0].split("-"))
                # an older Linux does not know it, and nothing is lost by that
                libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _PAGE_OUT)


def compress_each(tensors: list[Tensor], files: Sequence[str | os.PathLike[str]]) -> list[Compressed]:
    """Compress tensors that have been read of files. The list is emptied: each is freed before the next one."""
    compressed, read = [], 0
    while tensors:
        read += tensors[0].nbytes
        compressed.append(compress(tensors.pop(0)))
        if read >= _READ_BYTES or not tensors:
            page_out(files)
            read = 0
    return compressed
