# SPDX-License-Identifier: Apache-2.0
import importlib.util


# the package is built with tools of the extra `dev`
if importlib.util.find_spec("build") is None or importlib.util.find_spec("twine") is None:
    collect_ignore_glob = ["test_*.py"]
