# SPDX-License-Identifier: Apache-2.0
"""TRL's parser, with errors of one line that name the flags that may have been meant."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from trl import TrlParser

from .errors import InputError


_RENAMED = {"--warmup_ratio": "--warmup_steps, which below 1 is a share of the steps"}
"""Flags that earlier versions of Transformers had."""


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
        return parsed, rest

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        rest: list[str] = super().set_defaults_with_config(**kwargs)
        if rest:
            flags = [word for word in rest if word.startswith("--") and word[2:] in kwargs]
            self.error(f"unknown in the YAML file: {self._with_flags_like(flags)}")
        return rest

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
