# SPDX-License-Identifier: Apache-2.0
import importlib.util
import sys
from pathlib import Path


# the benchmarks are not installed: they are run from the repository root
sys.path.insert(0, str(Path(__file__).parents[2]))

# they draw with Matplotlib, of the extra `benchmarks`; the other tests do without
if importlib.util.find_spec("matplotlib") is None:
    collect_ignore_glob = ["test_*.py"]
