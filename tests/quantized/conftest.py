# SPDX-License-Identifier: Apache-2.0
import pytest
import torch


@pytest.fixture(autouse=True)
def bitnet_in_eager_mode(request):
    """Transformers' BitNet layer compiles its activation rounding, which takes longer than all tests here."""
    stance = "force_eager" if "bitnet" in request.node.name else "default"
    with torch.compiler.set_stance(stance):
        yield
