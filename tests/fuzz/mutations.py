# SPDX-License-Identifier: Apache-2.0
"""Mutations that keep a JSON text valid, so that the code behind the parser is reached; Atheris mutates bytes."""

from __future__ import annotations

import copy
import json
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
    if target == "header":
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
