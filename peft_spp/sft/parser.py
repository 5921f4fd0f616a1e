# SPDX-License-Identifier: Apache-2.0
"""TRL's parser, with errors of one line that name the flags that may have been meant."""

from __future__ import annotations

import json
from argparse import Action, ArgumentTypeError
from collections.abc import Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from types import NoneType
from typing import Any, NoReturn, get_args, get_type_hints

from trl import TrlParser

from .errors import InputError


_RENAMED = {
    "--warmup_ratio": "--warmup_steps, which below 1 is a share of the steps",
    "--group_by_length": "--train_sampling_strategy group_by_length",
    "--torch_dtype": "--dtype",
    "--no_cuda": "--use_cpu",
    "--use_flash_attention_2": "--attn_implementation flash_attention_2",
}
"""Flags that earlier versions of Transformers had."""

_WORDS = {True: ("true", "yes", "on"), False: ("false", "no", "off")}
"""What YAML reads as true or false if it is not in quotes."""


class Parser(TrlParser):
    """TRL's parser. An unknown flag is an error before the values of the others are looked at."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}. `{self.prog} --help` shows SPP's flags, and `--help-all` all flags.")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        parsed, rest = super().parse_known_args(args, namespace)
        if rest:
            flags = [word.partition("=")[0] for word in rest if word.startswith("--")]
            # values that follow an unknown flag are left over with it
            self.error(f"unknown flag {self._with_flags_like(flags)}" if flags else f"{rest[0]!r} is not a flag")
        for name, value in vars(parsed).items():
            if name.endswith("_kwargs") and value is not None:
                self._check_object(name, value)
        return parsed, rest

    def _check_object(self, name: str, value: Any) -> None:
        try:
            found = json.loads(value) if isinstance(value, str) else value
        except ValueError as error:
            self.error(f"argument --{name}: {value!r} is not valid JSON: {error}")
        if not isinstance(found, Mapping):
            self.error(f"""argument --{name}: {value!r} is not a JSON object such as '{{"key": 1}}'""")

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        hints = {name: hint for one in self.dataclass_types for name, hint in get_type_hints(one).items()}
        may_be_empty = {
            action.dest
            for action in self._actions
            if action.default is None or NoneType in get_args(hints.get(action.dest))
        }
        rest: list[str] = super().set_defaults_with_config(**kwargs)
        if rest:
            flags = [word for word in rest if word.startswith("--") and word[2:] in kwargs]
            self.error(f"unknown in the YAML file: {self._with_flags_like(flags)}")
        for action in self._actions:
            if action.dest in kwargs and action.nargs != 0:
                value = kwargs[action.dest]
                if value is not None or action.dest not in may_be_empty:
                    self.set_defaults(**{action.dest: self._as_argument(action, value)})
        return rest

    def _as_argument(self, action: Action, value: Any) -> Any:
        """A value of the YAML file, of the type and among the choices that the flag has on the command line."""
        if isinstance(value, Mapping):
            return value
        if action.nargs == "+":
            return [self._as_word(action, one) for one in (value if isinstance(value, list) else [value])]
        return self._as_word(action, value)

    def _as_word(self, action: Action, value: Any) -> Any:
        kind, choices = action.type or str, action.choices
        # TRL wraps the types of flags that take `none`, and keeps the name
        name = getattr(kind, "__name__", "").replace("string_to_bool", "bool")
        # what is not a word on the command line either; and a number of rows is not a share
        if isinstance(value, Mapping) or (isinstance(value, (list, bool)) and name in ("str", "tuple")):
            return value
        if name == "float" and type(value) is int:
            return value
        if isinstance(value, bool) and choices is not None:
            value = next((word for word in _WORDS[value] if word in choices), value)
        with suppress(ValueError, TypeError, ArgumentTypeError):
            found = kind(str(value)) if callable(kind) else value
            if value is not None and (choices is None or found in choices):
                return found
        shown = "its empty value" if value is None else repr(value)
        what = f"one of {', '.join(map(str, choices))}" if choices else f"of type {name}"
        self.error(f"argument --{action.dest}: {shown} in the YAML file is not {what}")

    def _with_flags_like(self, unknown: Sequence[str]) -> str:
        # each flag has a second spelling, with dashes
        flags = [flag for flag in self._option_string_actions if flag.startswith("--") and "-" not in flag[2:]]
        near = {
            word: get_close_matches("--" + word[2:].replace("-", "_"), flags, n=3, cutoff=0.75) for word in unknown
        }
        near |= {word: [now] for word in unknown if (now := _RENAMED.get("--" + word[2:].replace("-", "_")))}
        return ", ".join(
            f"{word} (did you mean {' or '.join(found)}?)" if found else word for word, found in near.items()
        )
