# SPDX-License-Identifier: Apache-2.0
"""Printing on any terminal: one whose encoding lacks a character, one that is closed, a full disk."""

from __future__ import annotations

import codecs
import io
import os
import sys
from contextlib import suppress


_PLAIN = str.maketrans(
    {
        "─": "-", "━": "=", "│": "|", "┃": "|", "║": "|", "═": "=", "╸": "-", "╺": "-",
        "·": "*", "⊙": "*", "×": "x", "‖": "|", "−": "-", "–": "-", "—": "-", "…": "...", "•": "*",
        "‘": "'", "’": "'", "“": '"', "”": '"', "→": "->", "≤": "<=", "≥": ">=", "α": "alpha",
    }
)  # fmt: skip
"""What the reports and Rich print beyond ASCII, and what stands for it."""
_HANDLER = "peft_spp.plain"


def make_printable() -> None:
    """Let the standard streams write a plain stand-in for each character that their encoding lacks."""
    codecs.register_error(_HANDLER, _stand_in)
    for stream in (sys.stdout, sys.stderr):
        # others were asked for, as by PYTHONIOENCODING; `surrogateescape` is what Python takes in the locale "C"
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "backslashreplace", "surrogateescape"):
            stream.reconfigure(errors=_HANDLER)


def _stand_in(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(_PLAIN)
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end


def print_text(text: str) -> None:
    """Print to the standard output. Nothing happens where nobody reads it any more, as behind `| head`."""
    try:
        # not with `typer.echo`, which writes UTF-8 to a terminal that is ASCII
        print(text, flush=True)
    except BrokenPipeError:
        silence()
    except OSError:
        silence()
        raise


def silence() -> None:
    """Let the standard output lead nowhere, so that what is left in its buffer does not fail when Python ends."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, sys.stdout.fileno())
        finally:
            os.close(nowhere)
