# SPDX-License-Identifier: Apache-2.0
"""Run `run.py` of the current folder, PEFT's `method_comparison/MetaMathQA`, with SPP known to PEFT."""

import runpy
import sys
from pathlib import Path

import peft_spp  # noqa: F401  # registers SPP


if __name__ == "__main__":
    # as for a script: its own modules lie next to it
    sys.path.insert(0, str(Path.cwd()))
    sys.argv[0] = "run.py"
    runpy.run_path("run.py", run_name="__main__")
