# SPDX-License-Identifier: Apache-2.0
"""A fixture for the folders whose `conftest.py` imports it."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads only wait for each other at small sizes, and the order of sums depends on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
