# SPDX-License-Identifier: Apache-2.0
"""
Run another program with SPP registered: `python -m peft_spp PROGRAM ...` or `python -m peft_spp script.py ...`.

For programs that load adapters themselves and know nothing of peft_spp, such as `python -m peft_spp lm_eval`,
`python -m peft_spp transformers serve` and `accelerate launch -m peft_spp script.py`. What follows the name is passed
on. The commands that train are run too, for launchers: `accelerate launch -m peft_spp dpo ...`.
"""

from __future__ import annotations

import runpy
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from .cli import app
from .sft.methods import METHODS


_USAGE = f"""\
Usage: python -m peft_spp PROGRAM [ARGS]...
       python -m peft_spp SCRIPT.py [ARGS]...
       python -m peft_spp {"|".join(METHODS)} [ARGS]...

Import peft_spp and run a program (a module, or an installed command) or a script, so that it can load SPP adapters, or
one of peft-spp's commands that train, so that `accelerate launch -m peft_spp` runs it on several devices."""


def main() -> None:
    """Read the command line, and run what it names as `python` would."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(_USAGE, file=sys.stderr if len(sys.argv) < 2 else sys.stdout)
        raise SystemExit(2 if len(sys.argv) < 2 else 0)
    if sys.argv[1] in METHODS:
        app(args=sys.argv[1:], prog_name="peft-spp")
    del sys.argv[0]
    name = sys.argv[0]
    if name.endswith(".py") or Path(name).is_file():
        if not Path(name).is_file():
            raise SystemExit(f"The script {name!r} does not exist.")
        # where `python script.py` looks for modules first, in place of the current folder
        sys.path[0] = str(Path(name).resolve().parent)
        runpy.run_path(name, run_name="__main__")
    elif _is_command_only(name):
        (command,) = entry_points(group="console_scripts", name=name)
        raise SystemExit(command.load()())
    elif not _is_module(name):
        own_commands = {one.name or getattr(one.callback, "__name__", "") for one in app.registered_commands}
        own = f" `peft-spp {name}` is a separate command." if name in own_commands else ""
        raise SystemExit(f"{name!r} is not a Python module or a command that is installed with one.{own}")
    else:
        runpy.run_module(name, run_name="__main__", alter_sys=True)


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):  # a folder that is not a package, or not the name of a module
        return False


def _is_command_only(name: str) -> bool:
    """Whether a name is that of an installed command and not of a module that can be run, as `transformers` is."""
    if not entry_points(group="console_scripts", name=name):
        return False
    module = find_spec(name) if name.isidentifier() else None
    is_package = module is not None and module.submodule_search_locations is not None
    return module is None or (is_package and find_spec(f"{name}.__main__") is None)


if __name__ == "__main__":
    main()
