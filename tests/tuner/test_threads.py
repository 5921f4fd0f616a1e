# SPDX-License-Identifier: Apache-2.0
"""Forward passes in several threads at once."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_spp import SPPConfig
from peft_spp.tuner.param_wrapper import replaced_parameter

from helpers.tiny import MLP, randomize
from helpers.tiny_moe import IDS, PARAMETERS, tiny_moe


class Meeting:
    """Lets two threads overlap in a call: the first one to come in is the first one to go out."""

    def __init__(self) -> None:
        self.second_is_in, self.first_is_out = threading.Event(), threading.Event()
        self.lock, self.first = threading.Lock(), None

    def inside(self) -> None:
        with self.lock:
            is_first = self.first is None
            if is_first:
                self.first = threading.get_ident()
        if is_first:
            assert self.second_is_in.wait(20)
        else:
            self.second_is_in.set()
            assert self.first_is_out.wait(20)

    def run(self, *functions):
        """The results of the functions, each in a thread."""

        def one(function):
            try:
                return function()
            finally:
                if self.first == threading.get_ident():
                    self.first_is_out.set()

        with ThreadPoolExecutor(2) as threads:
            return [future.result() for future in [threads.submit(one, function) for function in functions]]


class Stack(nn.Module):
    """A stack of weights, in whose forward pass threads can meet."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, 4))
        self.other = nn.Parameter(torch.randn(3, 5, 5))
        self.meet = lambda: None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.einsum("ti,eoi->to", x, self.weight)
        self.meet()
        return torch.einsum("ti,eoi->to", y, self.other) + torch.einsum("ti,eoi->to", x, self.weight)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Stack()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x)


def adapted_stack() -> tuple[nn.Module, Stack]:
    torch.manual_seed(0)
    config = SPPConfig(r=2, target_modules=[], target_parameters=["experts.weight", "experts.other"])
    model = get_peft_model(Model(), config)
    randomize(model)
    stack = model.base_model.model.experts.get_base_layer()
    assert type(stack) is Stack
    return model, stack


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


def test_experts_in_two_threads_that_overlap():
    model, stack = adapted_stack()
    expected, state = model(X), dict(stack.__dict__)
    with model.disable_adapter():
        base = model(X)
    meeting = Meeting()
    stack.meet = meeting.inside
    for found in meeting.run(lambda: model(X), lambda: model(X)):
        assert torch.equal(found, expected)
    stack.meet = state["meet"]
    assert type(stack) is Stack and stack.__dict__ == state
    with model.disable_adapter():
        assert torch.equal(model(X), base)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(X), expected)
    assert torch.equal(merged.state_dict()["experts.weight"], merged.experts.weight)


def test_an_error_in_one_thread_leaves_the_other_alone():
    model, stack = adapted_stack()
    expected, meet = model(X), stack.meet
    for fails_first in (True, False):
        meeting, failed = Meeting(), threading.local()

        def inside(meeting=meeting, failed=failed):
            meeting.inside()
            if getattr(failed, "wanted", False):
                raise KeyError("no")

        def failing(failed=failed):
            failed.wanted = True
            with pytest.raises(KeyError):
                model(X)

        stack.meet = inside
        results = meeting.run(*((failing, lambda: model(X)) if fails_first else (lambda: model(X), failing)))
        assert torch.equal(next(one for one in results if one is not None), expected)
        assert type(stack) is Stack
        stack.meet = meet
        assert torch.equal(model(X), expected)


def test_another_thread_sees_the_parameter_or_its_own_replacement():
    layer = nn.Linear(3, 2)
    weight = layer.weight
    with replaced_parameter(layer, "weight", torch.neg), ThreadPoolExecutor(1) as thread:
        assert thread.submit(lambda: layer.weight).result() is weight

        def double():
            with replaced_parameter(layer, "weight", lambda w: 2 * w):
                return layer.weight

        assert torch.equal(thread.submit(double).result(), 2 * weight)
        assert torch.equal(layer.weight, -weight)
        # what is set meanwhile is set
        thread.submit(lambda: setattr(layer, "weight", nn.Parameter(torch.ones(2, 3)))).result()
        assert torch.equal(layer.weight, -torch.ones(2, 3))
    assert type(layer) is nn.Linear and torch.equal(layer.weight, torch.ones(2, 3))


def test_models_that_share_a_class_in_threads_of_their_own():
    first, first_stack = adapted_stack()
    second, second_stack = copy.deepcopy(first), None
    randomize(second, scale=0.1)
    second_stack = second.base_model.model.experts.get_base_layer()
    expected = [first(X), second(X)]
    with second.disable_adapter():
        disabled = second(X)
        meeting = Meeting()
        first_stack.meet = second_stack.meet = meeting.inside
        found = meeting.run(lambda: first(X), lambda: second(X))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], disabled)
    first_stack.meet = second_stack.meet = lambda: None
    assert torch.equal(second(X), expected[1]) and type(first_stack) is type(second_stack) is Stack


@pytest.mark.parametrize("hook", ["hook", "forward"])
def test_hooked_layers_in_two_threads_that_overlap(hook):
    torch.manual_seed(0)
    model = get_peft_model(MLP(), SPPConfig(r=3, target_modules=["lin0", "lin1"], init_weights=False))
    layer = model.base_model.model.lin0.base_layer
    meeting = Meeting()
    meet = [lambda: None]
    if hook == "hook":
        layer.register_forward_hook(lambda module, args, output: meet[0]())
    else:
        own = layer.forward

        def forward(x):
            meet[0]()
            return own(x)

        layer.forward = forward
    xs = torch.randn(2, 5, 12)
    expected, state = [model(x) for x in xs], dict(layer.__dict__)
    meet[0] = meeting.inside
    found = meeting.run(lambda: model(xs[0]), lambda: model(xs[1]))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert layer.__dict__ == state
    meet[0] = lambda: None
    with model.disable_adapter():
        plain = copy.deepcopy(model).unload()
        assert torch.equal(model(xs[0]), plain(xs[0]))
    assert torch.equal(model(xs[1]), expected[1])


def test_two_batches_of_several_adapters_at_once():
    torch.manual_seed(0)
    model = get_peft_model(MLP(), SPPConfig(r=3, target_modules=["lin0"], init_weights=False), adapter_name="a")
    model.add_adapter("b", SPPConfig(r=2, target_modules=["lin0"], init_weights=False))
    model.eval()
    meeting, meet = Meeting(), [lambda: None]
    model.base_model.model.relu.register_forward_hook(lambda module, args, output: meet[0]())
    x = torch.randn(3, 12)
    names = (["a", "b", "__base__"], ["b", "b", "a"])
    expected = [model(x, adapter_names=one) for one in names] + [model(x)]
    meet[0] = meeting.inside
    found = meeting.run(*(lambda one=one: model(x, adapter_names=one) for one in names))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    meeting = Meeting()
    meet[0] = meeting.inside
    found = meeting.run(lambda: model(x, adapter_names=names[0]), lambda: model(x))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[2])


def test_a_backward_pass_in_another_thread_computes_forward_again():
    model, stack = adapted_stack()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(model(X).square().sum(), parameters)
    loss = checkpoint(model, X, use_reentrant=False).square().sum()
    with ThreadPoolExecutor(1) as thread, replaced_parameter(stack, "weight", torch.zeros_like):
        found = thread.submit(torch.autograd.grad, loss, parameters).result()
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert type(stack) is Stack


def test_many_threads_on_a_mixture():
    model = tiny_moe("mixtral")
    with torch.no_grad():
        base = model(IDS).logits
    model = get_peft_model(model, SPPConfig(r=4, target_modules=["q_proj"], target_parameters=PARAMETERS)).eval()
    randomize(model)
    with torch.no_grad():
        expected = model(IDS).logits
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(input_ids=IDS, **settings)
    with ThreadPoolExecutor(4) as threads:
        outputs = [threads.submit(torch.no_grad()(model), IDS) for _ in range(24)]
        generated = [threads.submit(model.generate, input_ids=IDS, **settings) for _ in range(4)]
        assert all(torch.equal(output.result().logits, expected) for output in outputs)
        assert all(torch.equal(one.result(), tokens) for one in generated)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(IDS).logits, base)


def test_merged_adapters_are_disabled_in_two_threads():
    model, _ = adapted_stack()
    with model.disable_adapter():
        base = model(X)
    for _ in range(10):
        model.merge_adapter()
        with model.disable_adapter(), ThreadPoolExecutor(4) as threads:
            assert all(torch.equal(one, base) for one in threads.map(model, [X] * 8))
