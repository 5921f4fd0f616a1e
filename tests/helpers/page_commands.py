# SPDX-License-Identifier: Apache-2.0
"""Commands as the pages show them: parsed by the programs that they are for, and run if they are peft-spp's."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import typer
from typer.main import get_command
from typer.testing import CliRunner

from peft_spp.cli import app
from peft_spp.sft.methods import METHODS


ROOT = Path(__file__).parents[2]
# what is not ours: named here, so that a misspelt program does not pass
OTHERS = {"swift", "pytest", "mutmut", "mkdocs", "ruff", "mypy", "git", "zstd", "twine"}


def check_command(words: list[str]) -> None:
    """Raise an error if a command could not be run as it stands."""
    while re.fullmatch(r"[A-Z_0-9]+=\S*", words[0]):
        words = words[1:]
    program, arguments = words[0], words[1:]
    if program == "peft-spp":
        check_peft_spp(arguments)
    elif program in PROGRAMS:
        PROGRAMS[program](arguments)
    else:
        assert program in OTHERS, f"{program} is not known to this test"


def check_peft_spp(arguments: list[str]) -> None:
    if arguments[0] in METHODS and "--help" not in arguments:
        from peft_spp.sft.arguments import parse_arguments

        # what a page shows may be meant for a GPU
        on_cpu = [] if "--use_cpu" in arguments else ["--use_cpu"]
        parse_arguments([*arguments[1:], *on_cpu], METHODS[arguments[0]])
    else:
        parse(app, arguments)


def parse(typer_app: typer.Typer, arguments: list[str]) -> None:
    """Parse arguments as a command does, down to the subcommand, and stop there."""
    command = get_command(typer_app)
    if arguments in (["--help"], ["--version"]):
        return
    context = command.make_context("program", list(arguments))
    if hasattr(command, "resolve_command"):
        # the group has taken its own options, and left the rest where it looks for it
        rest = [*getattr(context, "_protected_args", []), *context.args]
        name, subcommand, rest = command.resolve_command(context, rest)
        if rest != ["--help"]:
            subcommand.make_context(name, rest, parent=context)


def check_python(arguments: list[str]) -> None:
    if arguments[0] == "-c":
        compile(arguments[1], "-c", "exec")
    elif arguments[0] != "-m":
        assert (ROOT / arguments[0]).is_file(), arguments[0]
    elif arguments[1].startswith("benchmarks.") and importlib.util.find_spec("matplotlib"):
        module = importlib.import_module(arguments[1])
        if hasattr(module, "__path__"):
            module = importlib.import_module(f"{arguments[1]}.__main__")
        parse(module.app, arguments[2:])
    else:
        assert importlib.util.find_spec(arguments[1].partition(".")[0]), arguments[1]


def check_pip(arguments: list[str]) -> None:
    """Extras that are named have to be there."""
    assert arguments[0] in ("install", "download"), arguments
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = project.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    extras = set(re.findall(r"^([\w-]+) = \[", section, re.MULTILINE))
    for found in re.findall(r"(?:peft-spp|\.)\[([\w,-]+)\]", " ".join(arguments)):
        assert set(found.split(",")) <= extras, found


def check_accelerate(arguments: list[str]) -> None:
    """A configuration that is named has to be there, and the module that is launched too."""
    assert arguments[0] == "launch", arguments
    if "--config_file" in arguments:
        file = arguments[arguments.index("--config_file") + 1]
        assert (ROOT / file).is_file(), file
    if "-m" in arguments:
        module, *rest = arguments[arguments.index("-m") + 1 :]
        assert importlib.util.find_spec(module)
        if module == "peft_spp" and rest[0] in METHODS and "..." not in rest:
            check_peft_spp(rest)


PROGRAMS: Mapping[str, Callable[[list[str]], None]] = {
    "python": check_python,
    "pip": check_pip,
    "accelerate": check_accelerate,
}


def run_command(words: list[str]) -> str:
    """Run a command of peft-spp in this process, and return what it prints."""
    result = CliRunner().invoke(app, words[1:], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    return result.output
