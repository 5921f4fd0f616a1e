# SPDX-License-Identifier: Apache-2.0
"""The bytes of a merged weight file, piece by piece in the order of the file.

Threads read and compute pieces ahead while the caller writes those that are ready. A piece is small, so that it stays
in the caches between reading, merging, counting and writing, and memory does not grow with the weights.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.compressed_tensor import CompressedTensor
from ..checkpoints.file_bytes import read_bytes
from ..checkpoints.tensor_file import StoredTensor, TensorFile
from ..functional import Compressed, Factors, merged_weight
from ..functional.bitmask import stored_places
from ..functional.compressed import decompress
from ..functional.row_blocks import row_tiles
from ..sparsity.bits import look_at
from ..sparsity.counting import PairCounts, count_pair
from .plan import Merge, Plan


PIECE_BYTES = 1 << 21
"""How many bytes of a weight are merged together: small enough for the allocator to give the same memory again, where
larger pieces would pay for fresh pages (9,000 page faults a gigabyte, and 30,000 with four times this)."""

_MAX_THREADS = 8


@dataclass(frozen=True)
class Piece:
    """A range of bytes to write."""

    file: Path  # the file to read them from
    start: int  # the first byte to read
    stop: int  # the byte after the last
    merge: Merge | None = None  # the weight that they are a part of, if an adapter is merged into it
    factors: Factors | None = None  # the factors that belong to this part of the weight
    rows: Compressed | None = None  # this part, if the weight is compressed; the bytes are its values


@dataclass(frozen=True)
class Written:
    """A piece, ready to write."""

    piece: Piece
    data: Tensor  # uint8, its bytes
    # what became of its zeros, if it is a part of a merged weight
    counts: PairCounts = field(default_factory=PairCounts)


@contextmanager
def piece_workers() -> Iterator[ThreadPoolExecutor]:
    """The threads that read and merge pieces: as many as the caller's operations would use, up to a few."""
    # A thread that merges a piece by itself waits for no other, as the threads of one split operation do. Their number
    # is a setting of each thread, and new threads inherit what was set last: so it is set again for the caller.
    caller_threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(_threads(), "peft-spp-merge", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(caller_threads)


def _threads() -> int:
    return min(torch.get_num_threads(), _MAX_THREADS)


def merged_pieces(workers: ThreadPoolExecutor, file: TensorFile, plan: Plan) -> Iterator[Written]:
    """Read a weight file and merge what the plan says, without holding more than a few pieces."""
    # one more for each thread to take while the caller writes
    ahead = 2 * _threads()
    waiting: deque[Future[Written]] = deque()
    for piece in _cut(file, plan):
        waiting.append(workers.submit(_make, piece))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _cut(file: TensorFile, plan: Plan) -> Iterator[Piece]:
    """Cover the whole file, its header included: what lies between changed tensors is copied unchanged."""
    copied_to = 0
    for name, tensor in file.tensors.items():
        merges, trained = plan.merges.get(name, []), plan.replaced.get(name)
        if not merges and trained is None:
            continue
        yield from _cut_range(file.path, copied_to, tensor.start)
        copied_to = tensor.stop
        for merge in merges:
            yield from _cut_weight(merge)
        if trained is not None:
            yield from _cut_range(trained.file, trained.start, trained.stop)
    yield from _cut_range(file.path, copied_to, file.size)


def _cut_range(path: Path, start: int, stop: int) -> Iterator[Piece]:
    for at in range(start, stop, PIECE_BYTES):
        yield Piece(path, at, min(at + PIECE_BYTES, stop))


def _cut_weight(merge: Merge) -> Iterator[Piece]:
    if isinstance(merge.weight, CompressedTensor):
        return _cut_values(merge, merge.weight)
    return _cut_rows(merge, merge.weight)


def _cut_values(merge: Merge, weight: CompressedTensor) -> Iterator[Piece]:
    """Parts of a compressed weight: the values of as many rows as would be a piece of the dense one."""
    compressed = weight.load_compressed()
    offsets = compressed.row_offsets
    itemsize = compressed.values.element_size()
    for own, factors in _tiles(merge, compressed.columns * itemsize):
        first, last = offsets[own.start], offsets[own.stop]
        rows = Compressed(
            compressed.values[first:last],
            compressed.bitmask[own],
            offsets[own.start : own.stop + 1] - first,
            compressed.columns,
        )
        start, stop = (weight.values.start + int(one) * itemsize for one in (first, last))
        yield Piece(weight.file, start, stop, merge, factors, rows)


def _cut_rows(merge: Merge, weight: StoredTensor) -> Iterator[Piece]:
    row_bytes = (weight.stop - weight.start) // weight.shape[0]
    for own, factors in _tiles(merge, row_bytes):
        start, stop = (weight.start + row * row_bytes for row in (own.start, own.stop))
        yield Piece(weight.file, start, stop, merge, factors)


def _tiles(merge: Merge, row_bytes: int) -> Iterator[tuple[slice, Factors]]:
    """
    Rows of a stored weight that make a piece, and the factors that belong to them.

    Of a weight stored `(out, in)` these are rows of equally long (parts of) row blocks, with their rows of A and B; of
    one stored `(in, out)` some inputs of all outputs, with their columns of A.
    """
    factors = _load_factors(merge)
    max_rows = max(1, PIECE_BYTES // max(row_bytes, 1))
    count = merge.weight.shape[0]
    if merge.transposed:
        for first in range(0, count, max_rows):
            own = slice(first, min(first + max_rows, count))
            yield own, Factors(factors.A[:, own], factors.B, factors.scaling)
        return
    within = slice(merge.first, merge.first + count)
    for tile in row_tiles(merge.module.B.shape[0], merge.module.r, within, max_rows):
        own = slice(tile.rows.start - merge.first, tile.rows.stop - merge.first)
        yield own, Factors(factors.A[tile.blocks], factors.B[tile.rows], factors.scaling)


def _load_factors(merge: Merge) -> Factors:
    assert isinstance(merge.weight.dtype, torch.dtype)  # the plan has no other weights
    return merge.module.load(merge.weight.dtype)


def _make(piece: Piece) -> Written:
    merge = piece.merge
    if merge is None or piece.factors is None:
        return Written(piece, read_bytes(piece.file, piece.start, piece.stop))
    if piece.rows is not None:
        stored = decompress(piece.rows)
    else:
        assert isinstance(merge.weight.dtype, torch.dtype)
        data = read_bytes(piece.file, piece.start, piece.stop)
        stored = data.view(merge.weight.dtype).view(-1, merge.weight.shape[1])
    merged = merged_weight(stored.t() if merge.transposed else stored, [piece.factors])
    merged = merged.t() if merge.transposed else merged
    counts = count_pair(stored, merged)
    _check(merge, stored, counts)
    values = merged.reshape(-1) if piece.rows is None else merged[stored_places(piece.rows)]
    return Written(piece, values.view(torch.uint8), counts)


def _check(merge: Merge, stored: Tensor, counts: PairCounts) -> None:
    if counts.non_finite and look_at(stored).non_finite:
        raise ValueError(
            f"tensor {merge.weight.name!r} of {merge.weight.file} contains NaN or infinite values before the merge: "
            "the base model is broken. Nothing was merged."
        )
    if counts.non_finite:
        raise ValueError(
            f"NaNs detected in the merged weights. The adapter in {merge.module.A.file.parent} seems to be broken "
            f"(module {merge.module.name!r}). Nothing was merged; use an earlier checkpoint of the adapter."
        )
    if counts.lost:
        raise ValueError(
            f"merging into {merge.weight.name!r} lost {counts.lost} zeros: this is a bug in peft_spp, please report "
            "it. Nothing was merged."
        )
