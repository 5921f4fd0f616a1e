# SPDX-License-Identifier: Apache-2.0
"""
The program `peft-spp`.

It is not in the package, since importing any part of that registers SPP with PEFT, and so imports PEFT and PyTorch:
seconds that help and shell completion do without. A command registers when it runs.
"""

import os
import sys


starting = False
"""Whether this program is reading its commands, so that `import peft_spp` leaves the registration to them."""


def main() -> None:
    """Run the command line."""
    try:
        _run()
    except KeyboardInterrupt:
        # before a command could say so, or while Python ends; as the shell has it
        sys.exit(130)


def _run() -> None:
    global starting
    # OpenMP reads it once, with PyTorch: threads that wait for work leave the processors to others
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    starting = True
    try:
        from peft_spp.cli import app
    finally:
        starting = False
    app(prog_name="peft-spp")
