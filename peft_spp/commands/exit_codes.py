# SPDX-License-Identifier: Apache-2.0
"""How a command ends: with 0, with 1 for what it was asked to find, and with 2 for trouble of any kind."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from .. import register_methods
from ..error_text import message
from .signals import Stopped, signals_as_errors
from .terminal import make_printable, silence


# as `diff` and `grep` do; a command that a signal stops ends as the shell has it, with 128 and the signal's number
FOUND, TROUBLE, STOPPED = 1, 2, 128


class CommandGroup(TyperGroup):
    """All commands: each ends with one of the exit codes, whatever is raised in it."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        make_printable()
        return super().main(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with errors_as_exit_codes(), signals_as_errors():
            return super().invoke(ctx)


class Command(TyperCommand):
    """One command: it registers SPP when it runs, which its help and shell completion do without."""

    def invoke(self, ctx: Any) -> Any:
        register_methods()
        return super().invoke(ctx)


@contextmanager
def errors_as_exit_codes() -> Iterator[None]:
    """While active, an error that says what is wrong ends the command with its message, any other with a traceback.

    Python itself ends with 1 after an uncaught error, which would read as a finding.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        number = error.args[0] if isinstance(error, Stopped) else signal.SIGINT
        _print_error("Interrupted." if number == signal.SIGINT else f"Stopped by {number.name}.")
        raise typer.Exit(code=STOPPED + number) from error
    except BrokenPipeError as error:
        # nobody reads what is printed: `peft-spp ... | head`
        silence()
        raise typer.Exit(code=TROUBLE) from error
    except Exception as error:
        # Click's exceptions say by themselves how to end: wrong usage, help, an exit code
        if hasattr(error, "exit_code"):
            raise
        _print_error(f"Error: {message(error)}" if _is_message(error) else traceback.format_exc().rstrip())
        raise typer.Exit(code=TROUBLE) from error


def _is_message(error: Exception) -> bool:
    """Whether an error says what is wrong with what the command was given, or with the machine."""
    # PyTorch is not imported for its error alone
    return isinstance(error, (ImportError, OSError, ValueError, MemoryError)) or (
        type(error).__name__ == "OutOfMemoryError"
    )


def _print_error(text: str) -> None:
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)
