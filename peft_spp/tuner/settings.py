# SPDX-License-Identifier: Apache-2.0
"""Checks of the values of a configuration, which may come from a file that somebody else has written."""

from __future__ import annotations

import json
import math
import numbers
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import peft
from peft.utils.peft_types import PeftType, TaskType

from ..checkpoints.safetensors_files import read_json


FORMAT_VERSION = 1
"""The version of the format that adapters are saved in."""

MAX_RANK = 1 << 20
"""The largest `r`: no layer has as many output rows."""

MAX_PATTERN = 100_000
"""The longest regular expression, in characters: longer ones take too long to compile."""

SECONDS = 0.5
"""How long the expressions of a configuration from a file may take to match, in seconds of the CPU."""

# Apart from what PEFT puts around an expression, one quantifier costs at most the square of the length of a name.
_HARMLESS_QUANTIFIERS = 1
_QUANTIFIER = re.compile(r"[*+?{]")
_REPEATED_GROUP = re.compile(r"\)[*+?{]")
# where the system does not count the time of the CPU, and if the process does not come to run at all
_PATIENCE = 10.0
_TRIAL = """
import json, re, signal, sys
if hasattr(signal, "setitimer"):
    signal.setitimer(signal.ITIMER_VIRTUAL, float(sys.argv[1]))
patterns, names = json.load(sys.stdin)
for number, (pattern, whole) in enumerate(patterns):
    print(number, flush=True)
    match = re.compile(pattern).fullmatch if whole else re.compile(pattern).match
    for name in names:
        match(name)
"""


def check_file(file: Path) -> None:
    """Check the settings in the file of a configuration; those of another method are left to PEFT."""
    settings = read_json(file, strict=True)
    if "peft_type" in settings and settings["peft_type"] not in list(PeftType):
        raise ValueError(
            f"{file} has peft_type {settings['peft_type']!r}, which PEFT {peft.__version__} does not support: "
            "upgrade PEFT, or copy the file again"
        )
    if settings.get("peft_type") == "SPP":
        try:
            check_format_version(settings.get("format_version", FORMAT_VERSION))
            check_settings(settings)
        except ValueError as error:
            raise ValueError(f"{file} has settings that are not valid: {error}") from error


def check_settings(settings: Mapping[str, Any]) -> None:
    """Check the values of a configuration one by one, before anything is made of them."""
    for name, (is_fine, expected) in _FIELDS.items():
        if name in settings and not is_fine(settings[name]):
            raise ValueError(f"`{name}` should be {expected} but the value passed is {_shown(settings[name])}")
    for name, choices in _CHOICES.items():
        if name in settings:
            check_choice(name, settings[name], choices)
    if isinstance(settings.get("target_modules"), str):
        # PEFT looks for layers in the names of a list alone
        for name in ("layers_to_transform", "layers_pattern"):
            if settings.get(name) is not None:
                raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
    if settings.get("layers_pattern") and settings.get("layers_to_transform") is None:
        raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")
    if "r" in settings:
        check_rank("r", settings["r"])
    for key, rank in (settings.get("rank_pattern") or {}).items():
        check_rank(f"rank_pattern[{_shown(key)}]", rank)
    for expression in expressions(settings):
        _check_compiles(expression)


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise a `ValueError` unless the value is one of the choices."""
    if value not in choices:
        listed = f"{', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}"
        raise ValueError(f"`{name}` should be {listed} but the value passed is {_shown(value)}")


def check_rank(name: str, r: Any) -> None:
    """Raise a `ValueError` unless `r` is a positive integer that a layer can have as many rows as."""
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(f"`{name}` should be a positive integer value but the value passed is {_shown(r)}")
    if r > MAX_RANK:
        raise ValueError(f"`{name}` should be at most {MAX_RANK} but the value passed is {_shown(r)}")


def check_format_version(version: Any) -> None:
    if isinstance(version, bool) or version != FORMAT_VERSION:
        raise ValueError(
            f"The adapter has format version {version!r}; this version of peft_spp reads version {FORMAT_VERSION}. "
            "Upgrade peft-spp to load it."
        )


class Expression(NamedTuple):
    """A regular expression that is matched with the names of modules."""

    field: str  # the field of the configuration that it comes from
    pattern: str  # what PEFT makes of it
    whole: bool  # whether it has to match the whole name, or the start of it


def expressions(settings: Mapping[str, Any]) -> list[Expression]:
    """The regular expressions that PEFT makes of a configuration."""
    found: list[Expression] = []
    for name in ("target_modules", "exclude_modules"):
        if isinstance(value := settings.get(name), str) and value.lower() != "all-linear":
            found.append(Expression(name, value, whole=True))
    for name in ("rank_pattern", "alpha_pattern"):
        found += [Expression(name, rf"(.*\.)?({key})$", whole=False) for key in settings.get(name) or {}]
    layers = settings.get("layers_pattern") or []
    for pattern in [layers] if isinstance(layers, str) else layers:
        found.append(Expression("layers_pattern", rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", whole=False))
    return found


def check_patterns(expressions: Sequence[Expression], names: Iterable[str]) -> None:
    """
    Check that regular expressions of a file come to an end on the names that they will be matched with.

    Python's `re` cannot be given a limit, and there are expressions of a few characters for which it takes longer than
    anybody waits. So one that could be of them is first tried in a process that the system ends after half a second.
    """
    suspects = [expression for expression in expressions if _could_take_long(expression)]
    slow = _try(suspects, list(names)) if suspects else None
    if slow is not None:
        pattern = slow.pattern if len(slow.pattern) <= 200 else f"{slow.pattern[:200]}..."
        raise ValueError(
            f"`{slow.field}` has the regular expression {pattern!r}, which takes more than {SECONDS} s to match "
            "against the module names. Rewrite it without nested repetitions, or list the names."
        )


def _could_take_long(expression: Expression) -> bool:
    """Errs on the side of yes: then the expression is tried."""
    pattern = expression.pattern.removeprefix(r"(.*\.)?").removeprefix(r"(?:^|.*?\.)")
    pattern = pattern.removesuffix(r"\.(?P<idx>\d+)\.").replace("(?:", "(")
    return len(_QUANTIFIER.findall(pattern)) > _HARMLESS_QUANTIFIERS or bool(_REPEATED_GROUP.search(pattern))


def _try(expressions: Sequence[Expression], names: list[str]) -> Expression | None:
    """Match all expressions with all names, and return the one that was being matched when the time was up."""
    job = json.dumps([[(one.pattern, one.whole) for one in expressions], names])
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _TRIAL, str(SECONDS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        output, errors = process.communicate(job, timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
    if process.returncode == 0:
        return None
    if not output or errors:
        raise ValueError(f"the regular expressions of the adapter could not be checked: {errors.strip()[-300:]}")
    return expressions[int(output.split()[-1])]


def _check_compiles(expression: Expression) -> None:
    name, pattern, _ = expression
    if len(pattern) > MAX_PATTERN:
        raise ValueError(f"`{name}` has a regular expression of {len(pattern)} characters; use at most {MAX_PATTERN}")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"`{name}` is not a valid regular expression: {_shown(pattern)} ({error})") from error


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python does not write out an integer of thousands of digits
        text = f"an integer of {value.bit_length()} bits" if isinstance(value, int) else type(value).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the floats
        return False


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list_of(is_fine: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (list, tuple, set)) and all(map(is_fine, value))


def _is_map_to(is_fine: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, Mapping) and all(isinstance(key, str) and is_fine(one) for key, one in value.items())
    )


def _any_of(*checks: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: any(check(value) for check in checks)


def _is_none(value: Any) -> bool:
    return value is None


def _is_string(value: Any) -> bool:
    return isinstance(value, str)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _anything(value: Any) -> bool:
    return True


_is_names = _any_of(_is_none, _is_string, _is_list_of(_is_string))
_is_integers = _is_list_of(_is_integer)

_CHOICES: dict[str, tuple[Any, ...]] = {
    "task_type": (*TaskType, None),
    "bias": ("none", "all", "spp_only"),
    "check_base": ("warn", "error", "off"),
    "init_weights": (True, False, "positive"),
}
# what a value of each field may be, and how to say so
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "spp_alpha": (_is_finite, "a finite number"),
    "spp_dropout": (lambda value: _is_finite(value) and 0.0 <= value < 1.0, "in [0, 1)"),
    "target_modules": (_is_names, "a string or a list of strings"),
    "exclude_modules": (_is_names, "a string or a list of strings"),
    "modules_to_save": (_is_names, "a list of strings"),
    "target_parameters": (_any_of(_is_none, _is_list_of(_is_string)), "a list of strings"),
    "layers_pattern": (_is_names, "a string or a list of strings"),
    "layers_to_transform": (_any_of(_is_none, _is_integer, _is_integers), "an integer or a list of integers"),
    "rank_pattern": (_any_of(_is_none, _is_map_to(_anything)), "a dictionary from names to ranks"),
    "alpha_pattern": (_any_of(_is_none, _is_map_to(_is_finite)), "a dictionary from names to finite numbers"),
    "trainable_token_indices": (
        _any_of(_is_none, _is_integers, _is_map_to(_is_integers)),
        "a list of integers, or a dictionary from names to such lists",
    ),
    "fan_in_fan_out": (_is_bool, "True or False"),
    "ensure_weight_tying": (_is_bool, "True or False"),
    "inference_mode": (_is_bool, "True or False"),
    "auto_mapping": (_any_of(_is_none, _is_map_to(_any_of(_is_none, _is_string))), "a dictionary of strings"),
    "base_model_name_or_path": (_any_of(_is_none, _is_string, lambda v: isinstance(v, os.PathLike)), "a string"),
    "revision": (_any_of(_is_none, _is_string), "a string"),
    "peft_version": (_any_of(_is_none, _is_string), "a string"),
    "weights_id": (_any_of(_is_none, _is_string), "a string"),
}
