# SPDX-License-Identifier: Apache-2.0
import pytest

from peft_spp.native.library import load_library
from peft_spp.sparsity import mask_record

from helpers.sparsity_tiny_models import tiny_gpt2, tiny_llama


@pytest.fixture(scope="module", params=["native", "pytorch"])
def way(request):
    """The compiled pass over a mask, and PyTorch's operations."""
    if request.param == "native" and load_library() is None:
        pytest.skip("no C++ compiler that works with this PyTorch")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "pytorch":
            patch.setattr(mask_record, "mask_sums", lambda *_: None)
        yield request.param


@pytest.fixture(scope="module")
def llama():
    return tiny_llama()


@pytest.fixture(scope="module")
def gpt2():
    return tiny_gpt2()
