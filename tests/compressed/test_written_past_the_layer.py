# SPDX-License-Identifier: Apache-2.0
"""Tensors of a compressed module that are written or replaced by others: counted again, or refused."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from accelerate.utils import set_module_tensor_to_device
from torch import nn
from torch.func import functional_call

from peft_spp import CompressedLinear, compress, decompress

from helpers.tiny import prune_
from helpers.tiny_moe import IDS, tiny_moe


X = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))


def layer(seed, pattern="2:4"):
    torch.manual_seed(seed)
    linear = nn.Linear(64, 24)
    prune_(linear.weight, pattern)
    return CompressedLinear.from_linear(linear)


@pytest.mark.parametrize("pattern", ["2:4", "0.75", "0.25"])
def test_a_call_with_other_tensors_computes_with_those(pattern):
    own, other = layer(1), layer(2, pattern)
    expected = own(X)
    assert torch.equal(functional_call(own, other.state_dict(), (X,)), other(X))
    assert torch.equal(own(X), expected)


def in_place(own, other):
    for name, tensor in own.state_dict().items():
        tensor.copy_(other.state_dict()[name])


def by_accelerate(own, other):
    for name, tensor in other.state_dict().items():
        if name == "weight":
            own.weight = None  # accelerate compares shapes
            own.weight = nn.Parameter(tensor.clone(), requires_grad=False)
        else:
            set_module_tensor_to_device(own, name, "cpu", value=tensor)


def by_attribute(own, other):
    own.weight, own.bitmask, own.bias = copy.deepcopy((other.weight, other.bitmask, other.bias))


@pytest.mark.parametrize("write", [in_place, by_accelerate, by_attribute])
def test_what_is_written_is_what_is_computed_with(write):
    own, other = layer(1), layer(2)
    own(X)
    write(own, other)
    for same in (own, copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert torch.equal(same(X), other(X)) and torch.equal(same.dequantize(), other.dequantize())


def test_tensors_that_do_not_fit_are_refused_before_they_are_read():
    own, other = layer(1), layer(2, "0.75")
    own.load_state_dict({"bitmask": other.bitmask}, strict=False)
    with pytest.raises(ValueError, match=r"has \d+ bits, and there are \d+ values"):
        own(X)
    own.load_state_dict(other.state_dict())
    assert torch.equal(own(X), other(X))
    own.bitmask.fill_(0)
    with pytest.raises(ValueError, match="has 0 bits"):
        own.dequantize()


def test_the_stacks_of_experts_are_counted_again_too():
    own, other = (tiny_moe("mixtral", seed, "2:4") for seed in (0, 1))
    for model in (own, other):
        compress(model)
    with torch.no_grad():
        own(IDS)
        for name, tensor in own.state_dict().items():
            tensor.copy_(other.state_dict()[name])
        torch.testing.assert_close(own(IDS).logits, other(IDS).logits, atol=0, rtol=0)
    stacks = [tensor for name, tensor in own.named_buffers() if name.endswith("_bitmask")]
    assert stacks
    stacks[0].fill_(0)
    with pytest.raises(ValueError, match="has 0 bits"):
        own(IDS)


def test_gradients_after_a_first_call_in_inference_mode():
    own = copy.deepcopy(layer(1))
    with torch.inference_mode():
        own(X)
    x = X.clone().requires_grad_()
    own(x).sum().backward()
    torch.testing.assert_close(x.grad, own.dequantize().sum(0).expand_as(x))


def test_a_call_with_other_tensors_leaves_the_layers_own_for_what_is_compiled():
    own, other = layer(1), layer(2)
    expected = own(X)
    functional_call(own, other.state_dict(), (X,))
    torch.testing.assert_close(torch.compile(own, backend="eager", fullgraph=True)(X), expected)


def test_nothing_of_a_module_is_kept_by_what_was_counted():
    own = layer(1)
    own(X)
    bitmask = weakref.ref(own.bitmask)
    own.to("meta")
    gc.collect()
    assert bitmask() is None
    model = compress(tiny_moe("mixtral", 0, "2:4"))
    decompress(model)
    assert not [module for module in model.modules() if "_counted" in vars(module)]
