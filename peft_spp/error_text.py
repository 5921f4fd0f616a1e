# SPDX-License-Identifier: Apache-2.0
"""The messages of other libraries' exceptions, on one line, to be quoted in messages of ours."""

from __future__ import annotations


def message(error: BaseException) -> str:
    """The message of an error on one line, or the name of the error if it has none."""
    # that of a KeyError is the key alone
    text = f"there is no {error}" if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()) or type(error).__name__


def one_line(error: BaseException) -> str:
    """The message of an error of another library on one line, with that of its cause if the message leaves it out."""
    text = message(error)
    if error.__cause__ is None:
        return text
    cause = one_line(error.__cause__)
    return text if cause in text else f"{text}: {cause}"
