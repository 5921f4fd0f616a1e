# SPDX-License-Identifier: Apache-2.0
"""A check of every model type of Transformers, one after the other, whose rows make a committed table."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import transformers

from . import every_model


Row = dict[str, Any]


def main(
    check: Callable[[str], Row],
    seconds: int,
    write: Callable[[dict[str, Row]], object],
    model_types: Iterable[str] | None = None,
) -> None:
    """Check the model types that the command line names, or all that have no row yet.

    Args:
        check (`Callable[[str], dict[str, Any]]`): Makes the row of a model type.
        seconds (`int`): How much time of the processor a model type may take.
        write (`Callable[[dict[str, dict[str, Any]]], object]`): Writes the table, with `--write`.
        model_types (`Iterable[str]`, *optional*): Which there are, instead of all of Transformers.
    """
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser()
    parser.add_argument("model_types", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("every_model.jsonl"))
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    lines = arguments.out.read_text().splitlines() if arguments.out.exists() else []
    done: dict[str, Row] = dict(json.loads(line) for line in lines)
    signal.signal(signal.SIGPROF, _out_of_time)  # of the process, however busy the machine is
    for model_type in arguments.model_types or model_types or every_model.model_types():
        if model_type in done and not arguments.model_types:
            continue
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            done[model_type] = check(model_type)
        except TimeoutError:
            done[model_type] = {"status": "unusable", "reason": f"not done in {seconds} s"}
        except Exception as error:
            done[model_type] = {"status": "fault", "faults": [f"{type(error).__name__}: {short(error)}"]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        with arguments.out.open("a") as file:
            file.write(json.dumps([model_type, done[model_type]]) + "\n")
        print(model_type, done[model_type], flush=True)
    if arguments.write:
        write(dict(sorted(done.items())))


def write_table(file: Path, table: dict[str, Row]) -> None:
    file.write_text(json.dumps(table, indent=1) + "\n")


def short(error: Exception) -> str:
    """The first line of an error."""
    return str(error).strip().partition("\n")[0][:160]


def first_sentence(error: Exception, folder: str) -> str:
    """The first sentence of an error, without the name of a temporary folder."""
    return str(error).strip().partition("\n")[0].replace(f"{folder}/", "").partition(". ")[0].rstrip(".")


def _out_of_time(*_: Any) -> None:
    raise TimeoutError
