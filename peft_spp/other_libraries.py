# SPDX-License-Identifier: Apache-2.0
"""What other libraries print between the lines of ours."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_their_future_warnings() -> Iterator[None]:
    """While active, one library does not warn that another calls it in a way that it will give up."""
    with warnings.catch_warnings():
        for library in ("transformers", "trl", "peft", "accelerate", "datasets"):
            warnings.filterwarnings("ignore", category=FutureWarning, module=rf"{library}(\.|$)")
        yield
