# SPDX-License-Identifier: Apache-2.0
"""Signals that stop a command, as errors: what it has not finished is removed on the way out."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
_OF_PYTHON = (signal.SIG_DFL, signal.default_int_handler)
_SECONDS_TO_STOP = 1.0

_handled: dict[signal.Signals, tuple[Any, Any]] = {}
"""The signals that are errors now, with their handlers and those that they had before, which workers get back."""

_of_thread = threading.local()


class Stopped(KeyboardInterrupt):
    """A signal that ends the command, with its number: what is not finished is removed on the way out."""


@contextmanager
def signals_as_errors() -> Iterator[None]:
    """
    While active, Ctrl-C, SIGTERM (from `kill`, `timeout` or a scheduler) and SIGHUP (from a terminal that is closed)
    raise [`Stopped`]. A signal that is ignored, as under `nohup`, or that somebody else handles is left alone.
    """
    names = (name for name in _SIGNALS if hasattr(signal, name))
    handlers = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in names}
    alarm = signal.getsignal(signal.SIGALRM) if hasattr(signal, "setitimer") else None
    first: list[signal.Signals] = []

    def stop(number: int, frame: Any) -> None:
        first.append(signal.Signals(number))
        # Python drops what is raised in a destructor or while it forks: then it is raised once more
        if hasattr(signal, "setitimer"):
            signal.signal(signal.SIGALRM, lambda *_: stop(first[0], None))
            signal.setitimer(signal.ITIMER_REAL, _SECONDS_TO_STOP)
        if not _is_stopping():
            raise Stopped(first[0])

    # only the main thread may set them
    is_main = threading.current_thread() is threading.main_thread()
    ours = {one: handler for one, handler in handlers.items() if is_main and handler in _OF_PYTHON}
    for number, handler in ours.items():
        _handled[number] = stop, handler
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
            _handled.pop(number, None)  # in a worker it is gone
        if first and hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, alarm)


def _hold_signals() -> None:
    # Python forgets a signal that reaches a forked process at its very start
    _of_thread.held = ()
    # either call may also run a handler, and so end with its error
    _of_thread.held = set(_handled) - signal.pthread_sigmask(signal.SIG_BLOCK, ())
    signal.pthread_sigmask(signal.SIG_BLOCK, _of_thread.held)


def _take_signals() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _of_thread.held)


def _take_signals_in_worker() -> None:
    for number, (ours, before) in _handled.items():
        if signal.getsignal(number) is ours:
            signal.signal(number, before)
    _handled.clear()
    _take_signals()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_hold_signals, after_in_parent=_take_signals, after_in_child=_take_signals_in_worker)


def _is_stopping() -> bool:
    """Whether the command is on its way out, which nothing should interrupt."""
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, Stopped):
        error = error.__context__
    return error is not None
