# SPDX-License-Identifier: Apache-2.0
"""What an adapter remembers of the mask it was trained on, and how another mask relates to it."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..functional.bitmask import Compressed
from ..functional.compressed import decompress
from ..native.mask import mask_sums
from .pattern import parse_patterns, pattern_name


MaskRelation = Literal["same", "refined", "different"]

SAMPLES = 1024
"""How many places of a mask are remembered one by one."""

_PATTERNS = parse_patterns(("2:4", "4:8", "2:8"))
# On CPU the booleans of a piece stay in the cache; on an accelerator few large kernels beat many small ones.
_PIECE_ELEMENTS = {"cpu": 1 << 20}
_PIECE_ELEMENTS_DEFAULT = 1 << 26
# Multiplying eight bytes of 0 or 1 by this brings them together, a bit each, in the top byte.
_GATHER_BITS = 0x0102040810204080
# 2^64 / golden ratio: multiples of it fall evenly into [0, 2^64)
_GOLDEN = 0x9E3779B97F4A7C15
# Shifts and factors of the mix. The last two rounds are those of splitmix64; without the first, an exchange of two
# 64th places of words left a half as it was about once in 2^49 times.
_ROUNDS = ((32, _GOLDEN), (30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31
_SEEDS = (0x243F6A8885A308D3, 0x13198A2E03707344)  # hexadecimal digits of pi
# what the fingerprint is made by
_KIND = "mix"


@dataclass(frozen=True)
class MaskRecord:
    """
    What is kept of one weight's mask: enough to tell it from any other, and small.

    Args:
        shape (`tuple[int, int]`): The number of outputs and of inputs.
        zeros (`int`): How many weights are zero.
        pattern (`str`): 2:8, 2:4 or 4:8, else `"unstructured"` or `"dense"`, as [`sparsity_report`] calls it.
        fingerprint (`str`):
            `mix:` and 128 bits in hexadecimal, two halves alike but for their pseudo-random numbers. A row is cut into
            words of 64 inputs. Each word is mixed with a number of its column, by a bijection of 64 bits in which
            every bit depends on all, and the words of a row are added up modulo 2^64; the sum is mixed with a number
            of the row, and these are added up. So masks that differ within one word of one row, in one place or in
            many, differ in both halves for certain; others agree in a half with a probability of about 2^-64, and in
            both of 2^-128, as far as mixed words behave like random ones. It is not a cryptographic hash.
        sample (`str`):
            The mask at `SAMPLES` evenly spread places (or all, if there are no more), in base64, a bit each.
    """

    shape: tuple[int, int]
    zeros: int
    pattern: str
    fingerprint: str
    sample: str

    @property
    def sparsity(self) -> float:
        """The share of weights that are zero, between 0 and 1."""
        return self.zeros / max(self.shape[0] * self.shape[1], 1)

    def relation_of(self, other: MaskRecord) -> MaskRelation:
        """
        How another mask relates to this one.

        Args:
            other (`MaskRecord`): The record of the other mask.

        Returns:
            `str`: `"same"`; `"refined"` if every place that is zero here is zero there, and more are, as after
            rounding to NF4; `"different"` otherwise, also if the other weight is dense or of another shape. That every
            zero is kept is told from the sampled places: if a share f of the zeros were lost, this would be noticed
            with probability `1 - (1 - f)^k`, with k the number of zeros among the samples (about 512 at 50 %).
        """
        if other.shape != self.shape:
            return "different"
        if other == self:
            return "same"
        zeros_here, zeros_there = self._sampled_zeros(), other._sampled_zeros()
        refined = other.zeros > self.zeros and zeros_here & ~zeros_there == 0
        return "refined" if refined else "different"

    def _sampled_zeros(self) -> int:
        return int.from_bytes(base64.b64decode(self.sample), "little")

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data for JSON.

        Returns:
            `dict[str, Any]`: Numbers, strings and lists only.
        """
        return {**asdict(self), "shape": list(self.shape)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MaskRecord:
        """Read what [`to_dict`] gave.

        Args:
            data (`Mapping[str, Any]`): The data.

        Returns:
            `MaskRecord`: The record.

        Raises:
            ValueError: If a part is missing or of another kind; the message names it.
        """
        shape = data.get("shape")
        if (
            not isinstance(shape, (list, tuple))
            or len(shape) != 2
            or not all(isinstance(size, int) and size >= 0 for size in shape)
        ):
            raise ValueError(f"the mask record's 'shape' should be two sizes but is {shape!r}")
        for name, kind in (("zeros", int), ("pattern", str), ("fingerprint", str), ("sample", str)):
            if not isinstance(data.get(name), kind):
                raise ValueError(
                    f"the mask record's {name!r} should be of type {kind.__name__} but is {data.get(name)!r}"
                )
        if not 0 <= data["zeros"] <= shape[0] * shape[1]:
            raise ValueError(f"the mask record has {data['zeros']} zeros in a shape of {shape[0]}x{shape[1]}")
        try:
            sample = base64.b64decode(data["sample"], validate=True)
        except ValueError as error:
            raise ValueError(f"the mask record's 'sample' is not base64: {error}") from error
        if len(sample) != -(-min(shape[0] * shape[1], SAMPLES) // 8):
            raise ValueError(f"the mask record's 'sample' has {len(sample)} bytes, which does not fit its shape")
        return cls((shape[0], shape[1]), data["zeros"], data["pattern"], data["fingerprint"], data["sample"])


def record_mask(weight: Tensor | Compressed) -> MaskRecord:
    """
    Record the mask of a weight, in one pass, on the device where the weight lives.

    Args:
        weight (`torch.Tensor` or [`~peft_spp.functional.Compressed`]):
            Floating, shape `(out, in)`, any strides; `-0.0` counts as zero and NaN does not. Of a compressed weight
            the bitmask is read, and of the values only whether one is zero.

    Returns:
        `MaskRecord`: The same for the same mask, whatever the dtype, the device and the strides of the weight.

    Raises:
        ValueError: If the weight is not 2-D, or on the meta device.
    """
    if isinstance(weight, Compressed):
        if weight.values.is_meta or len(weight.shape) != 2 or weight.columns == 0 or not weight.values.all():
            return record_mask(decompress(weight))
        return _record_compressed(weight)
    if weight.is_meta:
        raise ValueError("a mask can be recorded only for a weight in memory, not on the meta device")
    if weight.dim() != 2:
        raise ValueError(f"a mask can be recorded only for a weight of shape (out, in), got {tuple(weight.shape)}")
    with torch.no_grad():
        return _record(weight.detach())


def record_rows(shape: tuple[int, int], pieces: Iterable[Tensor]) -> MaskRecord:
    """
    [`record_mask`] of a weight that is never in memory as a whole.

    Args:
        shape (`tuple[int, int]`): The shape of the weight, `(out, in)`.
        pieces (`Iterable[torch.Tensor]`): Its rows, in their order, on CPU.

    Returns:
        `MaskRecord`: The record.

    Raises:
        ValueError: If the pieces are not the rows of a weight of this shape.
    """
    word_numbers = _word_numbers(shape[1], torch.device("cpu"))
    rows, columns = _sampled_places(*shape, torch.device("cpu"))
    histogram = torch.zeros(256, dtype=torch.int64, device="cpu")
    row_sums = torch.empty(len(_SEEDS), shape[0], dtype=torch.int64, device="cpu")
    sampled_zero = torch.empty(len(rows), dtype=torch.bool, device="cpu")
    stop = 0
    with torch.no_grad():
        for piece in pieces:
            start, stop = stop, stop + piece.shape[0]
            if piece.shape[1] != shape[1] or stop > shape[0]:
                raise ValueError(f"{tuple(piece.shape)} are not rows {start} to {stop} of a weight of shape {shape}")
            row_sums[:, start:stop], counts = mask_sums(piece, word_numbers) or _mask_sums(piece, word_numbers)
            histogram += counts
            here = (start <= rows) & (rows < stop)
            sampled_zero[here] = piece[rows[here] - start, columns[here]] == 0
    if stop != shape[0]:
        raise ValueError(f"there are {stop} rows of a weight of shape {shape}")
    return _finish(torch.Size(shape), histogram, row_sums, sampled_zero)


def _record(weight: Tensor) -> MaskRecord:
    word_numbers = _word_numbers(weight.shape[1], weight.device)
    row_sums, histogram = mask_sums(weight, word_numbers) or _mask_sums(weight, word_numbers)
    rows, columns = _sampled_places(weight.shape[0], weight.shape[1], weight.device)
    return _finish(weight.shape, histogram, row_sums, weight[rows, columns] == 0)


def _record_compressed(weight: Compressed) -> MaskRecord:
    """The bitmask has a place in the bit where [`_bits`] puts it."""
    bits = weight.bitmask
    outputs, inputs = weight.shape
    histogram = torch.bincount(bits.flatten(), minlength=256)
    word_numbers = _word_numbers(inputs, bits.device)
    row_sums = torch.empty(len(_SEEDS), outputs, dtype=torch.int64, device=bits.device)
    step = max(1, _PIECE_ELEMENTS.get(bits.device.type, _PIECE_ELEMENTS_DEFAULT) // (word_numbers.shape[1] * 64))
    for start in range(0, outputs, step):
        piece = bits[start : start + step]
        words = _mix_(piece.contiguous().view(torch.int64) ^ word_numbers.unsqueeze(1))
        torch.sum(words, dim=2, out=row_sums[:, start : start + step])
    rows, columns = _sampled_places(outputs, inputs, bits.device)
    zero = (bits[rows, columns // 8].int() >> (columns % 8).int()) & 1 == 0
    return _finish(weight.shape, histogram, row_sums, zero)


def _word_numbers(inputs: int, device: torch.device) -> Tensor:
    words_a_row = max(1, -(-inputs // 64))
    return torch.stack([_pseudo_random(words_a_row, seed, device) for seed in _SEEDS])


def _mask_sums(weight: Tensor, word_numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The same as [`mask_sums`], in PyTorch's operations: for any dtype, on any device."""
    outputs, inputs = weight.shape
    words_a_row = word_numbers.shape[1]
    histogram = torch.zeros(256, dtype=torch.int64, device=weight.device)
    row_sums = torch.empty(len(_SEEDS), outputs, dtype=torch.int64, device=weight.device)
    most = _PIECE_ELEMENTS.get(weight.device.type, _PIECE_ELEMENTS_DEFAULT)
    step = max(1, most // (words_a_row * 64))
    # zero beyond the inputs, so that a row starts at a word of its own; laid out in memory as the weight is
    transposed = weight.stride(0) < weight.stride(1)
    shape = (min(step, outputs), words_a_row * 64)
    nonzero = torch.zeros(shape[::-1] if transposed else shape, dtype=torch.bool, device=weight.device)
    nonzero = nonzero.t() if transposed else nonzero
    for start in range(0, outputs, step):
        rows = weight[start : start + step]
        if rows.dtype == torch.float16:
            # PyTorch converts float16 several times more slowly than integers; all bits but the sign tell a zero
            rows = rows.view(torch.int16) << 1
        # A copy to bool is the fastest test for zero: 0.5 s for 7B weights in bfloat16 on 2 cores of an EPYC 9004,
        # where `!= 0` took 3.8 s.
        nonzero[: len(rows), :inputs].copy_(rows)
        bits = (_bits_transposed if transposed else _bits)(nonzero[: len(rows)])
        histogram += torch.bincount(bits.flatten(), minlength=256)
        words = _mix_(bits.view(torch.int64) ^ word_numbers.unsqueeze(1))
        torch.sum(words, dim=2, out=row_sums[:, start : start + step])
    return row_sums, histogram


def _bits(nonzero: Tensor) -> Tensor:
    """Eight places of a row in each byte, the first of them in its lowest bit."""
    return ((nonzero.view(torch.int64) * _GATHER_BITS) >> 56).to(torch.uint8)


def _bits_transposed(nonzero: Tensor) -> Tensor:
    """The same, of a transposed view: place by place, and only the bytes are brought into the order of the rows."""
    places = nonzero.t().view(torch.uint8).unflatten(0, (-1, 8)).unbind(1)
    bits = places[7].clone()
    for place in places[6::-1]:
        bits.bitwise_left_shift_(1).bitwise_or_(place)
    # not contiguous(): of one row it would keep strides that cannot be viewed as words
    return bits.t().clone(memory_format=torch.contiguous_format)


def _finish(shape: torch.Size, histogram: Tensor, row_sums: Tensor, sampled_zero: Tensor) -> MaskRecord:
    outputs, inputs = shape
    row_numbers = torch.stack([_pseudo_random(outputs, ~seed, row_sums.device) for seed in _SEEDS])
    sums = _mix_(row_sums ^ row_numbers).sum(dim=1).tolist()
    counts = {byte: count for byte, count in enumerate(histogram.tolist()) if count}
    nonzeros = sum(count * byte.bit_count() for byte, count in counts.items())
    halves = [max((byte & 15).bit_count(), (byte >> 4).bit_count()) for byte in counts]
    fullest = {4: max(halves, default=0), 8: max((byte.bit_count() for byte in counts), default=0)}
    zeros = outputs * inputs - nonzeros
    return MaskRecord(
        shape=(outputs, inputs),
        zeros=zeros,
        pattern=pattern_name(_PATTERNS, zeros, outputs * inputs, inputs, fullest),
        fingerprint=f"{_KIND}:" + "".join(f"{value % 2**64:016x}" for value in sums),
        sample=_sample(sampled_zero),
    )


def _sampled_places(outputs: int, inputs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The rows and the columns of the sampled places."""
    numel = outputs * inputs
    places = (
        list(range(numel))
        if numel <= SAMPLES
        else [((index * _GOLDEN) % 2**64 * numel) >> 64 for index in range(SAMPLES)]
    )
    index = torch.tensor(places, dtype=torch.int64, device=device)
    return index // max(inputs, 1), index % max(inputs, 1)


def _sample(zero: Tensor) -> str:
    """Which of the sampled places are zero, a bit each."""
    bits = sum(1 << position for position, is_zero in enumerate(zero.tolist()) if is_zero)
    return base64.b64encode(bits.to_bytes(-(-len(zero) // 8), "little")).decode()


def _pseudo_random(count: int, seed: int, device: torch.device) -> Tensor:
    """The same 64-bit numbers everywhere, as splitmix64 makes them, with the mix used here."""
    steps = torch.arange(1, count + 1, device=device)
    return _mix_(steps.mul_(_signed(_GOLDEN)).add_(_signed(seed % 2**64)))


def _mix_(words: Tensor) -> Tensor:
    """Mix int64 words in place, as `mix` in mask.cpp."""
    for shift, factor in _ROUNDS:
        _xor_shifted_(words, shift).mul_(_signed(factor))
    return _xor_shifted_(words, _LAST_SHIFT)


def _xor_shifted_(words: Tensor, shift: int) -> Tensor:
    # PyTorch's shift copies the sign, and words and their complements would become the same
    return words.bitwise_xor_((words >> shift).bitwise_and_(2 ** (64 - shift) - 1))


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
