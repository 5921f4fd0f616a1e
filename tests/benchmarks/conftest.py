# SPDX-License-Identifier: Apache-2.0
import importlib.util


# they draw with Matplotlib, of the extra `benchmarks`; the other tests do without
if importlib.util.find_spec("matplotlib") is None:
    collect_ignore_glob = ["test_*.py"]
