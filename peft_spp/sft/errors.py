# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations


class InputError(ValueError):
    """Arguments, data, a model or a checkpoint that cannot be used, found before training has begun."""


def one_line(error: BaseException) -> str:
    """The message of an error of another library, and that of its cause, on one line."""
    message = " ".join(str(error).split()) or type(error).__name__
    return message if error.__cause__ is None else f"{message}: {one_line(error.__cause__)}"
