# SPDX-License-Identifier: Apache-2.0
"""What other libraries print between the lines of ours."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


@contextmanager
def without_their_future_warnings() -> Iterator[None]:
    """While active, one library does not warn that another calls it in a way that it will give up."""
    with warnings.catch_warnings():
        for library in ("transformers", "trl", "peft", "accelerate", "datasets"):
            warnings.filterwarnings("ignore", category=FutureWarning, module=rf"{library}(\.|$)")
        yield


# What quantization libraries log while they are imported, by the name of the logger: all of it is about their own
# compiled parts, and says nothing of a model.
_LOGGED_BY_IMPORTS = {
    "torchao": r"Failed to load |Skipping import of cpp extensions",
    "torch.utils._pytree": r" is an Enum subclass and is now natively supported",
    "bitsandbytes.backends.cpu.ops": r"Failed to load CPU gemm_4bit_forward from kernels-community",
}


@contextmanager
def quiet_imports() -> Iterator[None]:
    """While active, for imports alone: libraries that PEFT imports do not log what they lack. All else is logged."""
    with ExitStack() as stack:
        for name, message in _LOGGED_BY_IMPORTS.items():
            logger, drop = logging.getLogger(name), _Without(message)
            logger.addFilter(drop)
            stack.callback(logger.removeFilter, drop)
        yield


class _Without(logging.Filter):
    def __init__(self, message: str) -> None:
        super().__init__()
        self._message = re.compile(message)

    def filter(self, record: logging.LogRecord) -> bool:
        return self._message.search(record.getMessage()) is None
