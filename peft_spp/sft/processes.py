# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os


def is_first_process() -> bool:
    """Whether this process is the one to print, as a launcher's environment says."""
    return os.environ.get("RANK", "0") == "0"
