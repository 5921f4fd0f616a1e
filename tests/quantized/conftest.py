# SPDX-License-Identifier: Apache-2.0
import pytest
import torch


@pytest.fixture(autouse=True)
def eager():
    """Transformers' BitNet layer compiles its activation rounding, which takes longer than all tests here."""
    with torch.compiler.set_stance("force_eager"):
        yield
