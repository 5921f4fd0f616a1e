# SPDX-License-Identifier: Apache-2.0
"""Regular expressions of a configuration that would not come to an end, found before PEFT uses them.

Python's `re` tries one way to match after the other, and there are expressions, of a few characters, for which that
takes longer than anybody waits; it cannot be given a limit. So an expression that could be one of them is first tried
on the names of the model, by the same `re`, in a process of its own that the system ends after half a second.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence

from .settings import Expression


SECONDS = 0.5
"""How long the expressions of a configuration may take, in seconds of the CPU."""

# Beside what PEFT puts around an expression, one quantifier costs at most the square of the length of a name.
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


def check_patterns(expressions: Sequence[Expression], names: Iterable[str]) -> None:
    """
    Check that regular expressions come to an end on the names that they will be matched with.

    Args:
        expressions (`Sequence[Expression]`): The expressions.
        names (`Iterable[str]`): The names of modules.

    Raises:
        ValueError: If one does not; the message names it and its field.
    """
    suspects = [expression for expression in expressions if _could_take_long(expression)]
    culprit = _try(suspects, list(names)) if suspects else None
    if culprit is not None:
        pattern = culprit.pattern if len(culprit.pattern) <= 200 else f"{culprit.pattern[:200]}..."
        raise ValueError(
            f"`{culprit.field}` has the regular expression {pattern!r}, which takes more than {SECONDS} s to match "
            "with the names of the modules. Write it without a repetition inside of a repetition, or list the names."
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
        raise ValueError(f"the regular expressions of the adapter could not be tried: {errors.strip()[-300:]}")
    return expressions[int(output.split()[-1])]
