# SPDX-License-Identifier: Apache-2.0
"""Mutations that keep a file valid, so that the code behind its parser is reached; Atheris mutates bytes."""

from __future__ import annotations

import copy
import json
import math
import random
import struct
from typing import Any


_SEPARATOR = b"\n\x00\n"
_NUMBERS = [0, 1, -1, 2, 3, 10**6, 2**63, 10**12, -(10**12), 10**400, 0.5, 1e308, -0.0]
_EXPRESSIONS = ["all-linear", "(a+)+$", "(.*)*b", "a{1,9999}{1,9999}", "(", "[", "\\", "\ud800", "a" * 300]
_WORDS = ["", "SPP", "LORA", "/etc/passwd", "../x", "C:\\x", "a.safetensors", "F32", "BF16", "F8_E4M3", "first"]
_LISTS = [[], {}, [[]], [{}], {"": {}}, [0, 4], [4, 0], [0, 2**63], [1, 2, 3], ["first"], {"first": 1}, {"first": [1]}]
_INTERESTING = [None, True, False, *_NUMBERS, *_EXPRESSIONS, *_WORDS, *_LISTS]
_KEYS = ["", "x", "layers_pattern", "exclude_modules"]
_INSERTIONS = ["", "*", "+", "(", ")", "\\d", "/", "..", ".", "\u0000", "A"]


def mutate(target: str, data: bytes, seed: int) -> bytes | None:
    """
    Mutate the JSON in an input.

    Args:
        target (`str`): The name of the target.
        data (`bytes`): The input.
        seed (`int`): The seed of the random choices.

    Returns:
        `bytes` or `None`: Another input; `None` to leave the mutation to Atheris.
    """
    rng = random.Random(seed)
    if rng.random() < 0.3:
        return None
    if target in ("compressed", "old_compressed") and rng.random() < 0.8:
        return _mutate_tensors(data, rng)
    if target in ("header", "compressed", "old_compressed"):
        return _mutate_header(data, rng)
    if target == "adapter":
        settings, separator, weights = data.partition(_SEPARATOR)
        if rng.random() < 0.5:
            changed = _mutate_json(settings, rng)
            return changed and changed + separator + weights
        changed = _mutate_header(weights, rng)
        return changed and settings + separator + changed
    return _mutate_json(data, rng)


def _mutate_header(data: bytes, rng: random.Random) -> bytes | None:
    if len(data) < 8:
        return None
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = _mutate_json(data[8:end], rng)
    return header and struct.pack("<Q", len(header)) + header + data[end:]


_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "BOOL": 1}
_PARTS = ["weight", "bitmask", "compressed", "shape", "row_offsets", "bias"]


def _mutate_tensors(data: bytes, rng: random.Random) -> bytes | None:
    """Change tensors of a safetensors file, and write one that is valid again."""
    try:
        end = 8 + struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8:end])
        metadata = header.pop("__metadata__", None)
        tensors = {name: _tensor(one, data[end:]) for name, one in header.items()}
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            if metadata and rng.random() < 0.1:
                _mutate_columns(metadata, rng)
            elif tensors:
                _mutate_tensor(tensors, rng)
        return _write(tensors, metadata)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error, OverflowError):
        return None


def _tensor(entry: Any, data: bytes) -> list[Any]:
    start, stop = entry["data_offsets"]
    shape = list(entry["shape"])
    if len(shape) > 8 or not all(type(size) is int and 0 <= size < 1 << 62 for size in (*shape, start, stop)):
        raise ValueError("left to the other mutations")
    return [entry["dtype"], shape, bytearray(data[start:stop])]


def _write(tensors: dict[str, list[Any]], metadata: Any) -> bytes:
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    content = bytearray()
    for name, (dtype, shape, values) in tensors.items():
        start = len(content)
        content += values
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, len(content)]}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(content)


def _mutate_columns(metadata: dict[str, Any], rng: random.Random) -> None:
    key = rng.choice(list(metadata))
    changed = _mutate_json(metadata[key].encode(), rng) if rng.random() < 0.8 else None
    metadata[key] = rng.choice(_WORDS) if changed is None else changed.decode()


def _mutate_tensor(tensors: dict[str, list[Any]], rng: random.Random) -> None:
    name = rng.choice(list(tensors))
    tensor, what = tensors[name], rng.random()
    dtype, shape, values = tensor
    if what < 0.45 and values:
        # a bit is moved, set, or taken away; the first bytes of a shape are numbers
        for _ in range(rng.choice((1, 1, 2, 3))):
            values[rng.randrange(len(values))] ^= 1 << rng.randrange(8)
    elif what < 0.55 and shape:
        axis = rng.randrange(len(shape))
        _fill(tensor, [*shape[:axis], max(0, shape[axis] + rng.choice((-1, 1, -8, 8, 64))), *shape[axis + 1 :]], rng)
    elif what < 0.65:
        tensor[1] = rng.choice(_shapes(math.prod(shape)))
    elif what < 0.72:
        tensor[0] = rng.choice(list(_SIZES))
        if len(values) % _SIZES[tensor[0]] == 0 and rng.random() < 0.7:
            tensor[1] = [len(values) // _SIZES[tensor[0]]]
        else:
            _fill(tensor, shape, rng)
    elif what < 0.78:
        del tensors[name]
    elif what < 0.84:
        other = rng.choice(list(tensors))
        tensors[name], tensors[other] = tensors[other], tensor
    elif what < 0.9:
        start = name.rpartition(".")[0] if rng.random() < 0.7 else rng.choice(("", "a", "a.weight", "new"))
        tensors[f"{start}.{rng.choice(_PARTS)}"] = [dtype, list(shape), bytearray(values)]
    else:
        _fill(tensor, rng.choice(([0], [0, 8], [0, 1 << 33], [1 << 40, 0], [], [1], [2], [2, 0, 8], [5, 16])), rng)


def _fill(tensor: list[Any], shape: list[int], rng: random.Random) -> None:
    size = math.prod(shape) * _SIZES[tensor[0]]
    if size <= 4096:
        tensor[1] = shape
        tensor[2] = bytearray(
            (tensor[2] + rng.randbytes(size) if rng.random() < 0.5 else tensor[2] + bytes(size))[:size]
        )


def _shapes(count: int) -> list[list[int]]:
    return [
        [count],
        [1, count],
        [count, 1],
        [count, 1, 1],
        *([count // n, n] for n in (2, 4, 8, 16) if count % n == 0),
    ]


def _mutate_json(data: bytes, rng: random.Random) -> bytes | None:
    try:
        content = json.loads(data)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            content = _mutate(content, rng)
        return json.dumps(content).encode()
    except (ValueError, RecursionError):
        return None


def _mutate(content: Any, rng: random.Random) -> Any:
    """Change one place of a tree of lists and dictionaries."""
    places = _places(content)
    interesting = copy.deepcopy(rng.choice(_INTERESTING))
    if not places:
        return interesting
    holder, key = rng.choice(places)
    value, what = holder[key], rng.random()
    if what < 0.15:
        del holder[key]
    elif what < 0.3 and isinstance(holder, dict):
        holder[rng.choice([*_KEYS, str(rng.choice(places)[1])])] = value
        holder[key] = interesting
    elif what < 0.5 and isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        holder[key] = value[:at] + rng.choice(_INSERTIONS) + value[at:]
    elif what < 0.6 and isinstance(value, int):
        holder[key] = rng.choice((value - 1, value + 1, value + 2**31, -value))
    else:
        holder[key] = interesting
    return content


def _places(content: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in pairs:
        found.append((content, key))
        found += _places(value)
    return found
