# SPDX-License-Identifier: Apache-2.0
"""
What holds for any layer, dtype, pattern, and number and order of adapters.

The slow test draws 500 examples for each property: `pytest -m slow tests/tuner/test_properties.py`.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_spp import SPPConfig
from peft_spp.functional import Factors
from peft_spp.sparsity import record_mask, satisfies_n_m

from helpers import reference
from helpers.tiny import is_positive_zero, prune_


pytestmark = pytest.mark.filterwarnings("ignore")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
PATTERNS = ["0.0", "0.5", "0.9", "1.0", "2:4", "4:8", "2:8"]
# a quarter of the examples of the profile: 25, or 500 of the thorough one
some = settings(deadline=None, max_examples=max(1, settings().max_examples // 4))


class Layer(nn.Module):
    def __init__(self, m: int, n: int, conv1d: bool, bias: bool) -> None:
        super().__init__()
        self.layer = Conv1D(m, n) if conv1d else nn.Linear(n, m, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@dataclass(frozen=True)
class Case:
    """A base layer and the ranks and alphas of its adapters; everything random follows from the seed."""

    m: int
    n: int
    dtype: torch.dtype
    pattern: str
    conv1d: bool
    bias: bool
    adapters: tuple[tuple[int, float], ...]
    seed: int

    @property
    def names(self) -> list[str]:
        return [f"adapter{index}" for index in range(len(self.adapters))]

    def base(self) -> Layer:
        torch.manual_seed(self.seed)
        base = Layer(self.m, self.n, self.conv1d, self.bias)
        weight = base.layer.weight
        with torch.no_grad():
            weight.normal_()
            prune_(weight.T if self.conv1d else weight, self.pattern)
            weight[(weight == 0) & (torch.rand(weight.shape) < 0.2)] = -0.0
        return base.to(self.dtype)

    def config(self, r: int, alpha: float) -> SPPConfig:
        return SPPConfig(r=r, spp_alpha=alpha, target_modules=["layer"], fan_in_fan_out=self.conv1d)

    def model(self, scale: float | None = 1.0) -> PeftModel:
        """The base with all adapters active, their factors drawn at random unless `scale` is None."""
        base = self.base()
        for index, (name, (r, alpha)) in enumerate(zip(self.names, self.adapters, strict=True)):
            if index == 0:
                model = get_peft_model(base, self.config(r, alpha), adapter_name=name)
            else:
                model.add_adapter(name, self.config(r, alpha))
        model.base_model.set_adapter(self.names)
        with torch.no_grad():
            for name, parameter in model.named_parameters() if scale is not None else ():
                if ".spp_" in name:
                    parameter.normal_(std=scale)
        return model.eval()

    def x(self) -> torch.Tensor:
        return torch.randn(3, self.n, generator=torch.Generator().manual_seed(self.seed)).to(self.dtype)


@st.composite
def cases(draw, least_adapters=1, patterns=PATTERNS, scale_of_alpha=16.0):
    pattern = draw(st.sampled_from(patterns))
    group = int(pattern.partition(":")[2] or 1)
    m = draw(st.integers(1, 20))
    adapter = st.tuples(st.integers(1, m + 3), st.floats(-scale_of_alpha, scale_of_alpha, width=32))
    return Case(
        m=m,
        n=group * draw(st.integers(1, 24 // group)),
        dtype=draw(st.sampled_from(DTYPES)),
        pattern=pattern,
        conv1d=draw(st.booleans()),
        bias=draw(st.booleans()),
        adapters=tuple(draw(st.lists(adapter, min_size=least_adapters, max_size=4))),
        seed=draw(st.integers(0, 2**31)),
    )


def layer_of(model):
    return model.base_model.model.layer


def oriented(case: Case, weight: torch.Tensor) -> torch.Tensor:
    weight = weight.detach()
    return weight.T if case.conv1d else weight


def bits(tensor: torch.Tensor) -> torch.Tensor:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().clone().contiguous().view(integer)


def factors_of(model, names) -> list[Factors]:
    layer = layer_of(model)
    return [Factors(layer.spp_A[name].weight, layer.spp_B[name].weight, layer.scaling[name]) for name in names]


@given(cases())
@some
def test_fresh_adapters_are_the_identity(case):
    base = case.base()
    expected, before = base(case.x()), bits(base.layer.weight.abs())
    model = case.model(scale=None)
    assert torch.equal(model(case.x()), expected)
    model.merge_adapter()
    # the magnitude of every weight; the sign too, of all that are not zero
    assert torch.equal(bits(layer_of(model).get_base_layer().weight.abs()), before)
    assert torch.equal(layer_of(model).get_base_layer().weight, base.layer.weight)


@given(cases(), st.sampled_from([1.0, 1e4, 1e30]), st.booleans())
@some
def test_every_pruned_place_is_plus_zero_after_any_merge(case, scale, unload):
    pruned = oriented(case, case.base().layer.weight) == 0
    model = case.model(scale)
    merged = (
        model.merge_and_unload().layer.weight
        if unload
        else (model.merge_adapter(), layer_of(model).get_base_layer().weight)[1]
    )
    merged = oriented(case, merged)
    assert is_positive_zero(merged[pruned]).all()
    assert not (merged.signbit() & (merged == 0)).any()


@given(cases(patterns=["2:4", "4:8", "2:8"]))
@some
def test_the_pattern_is_kept_by_training_steps_and_merging(case):
    model = case.model(scale=0.1)
    before = record_mask(oriented(case, layer_of(model).get_base_layer().weight))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        model(case.x()).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert record_mask(oriented(case, layer_of(model).get_base_layer().weight)) == before
    merged = oriented(case, model.merge_and_unload().layer.weight)
    assert satisfies_n_m(merged, case.pattern)
    assert before.relation_of(record_mask(merged)) in ("same", "refined")


@given(cases(), st.data())
@some
def test_unmerging_restores_every_bit(case, data):
    model = case.model()
    before = bits(layer_of(model).get_base_layer().weight)
    for name in data.draw(st.permutations(case.names)):
        if data.draw(st.booleans()):
            model.merge_adapter([name])
    if layer_of(model).merged:
        model.unmerge_adapter()
    assert torch.equal(bits(layer_of(model).get_base_layer().weight), before)


@given(cases(least_adapters=2), st.data())
@some
def test_merging_one_by_one_in_any_order_is_merging_all_at_once(case, data):
    model = case.model()
    model.merge_adapter(case.names)
    expected = bits(layer_of(model).get_base_layer().weight)
    model.unmerge_adapter()
    order = data.draw(st.permutations(case.names))
    cut = data.draw(st.integers(0, len(order)))
    for names in (order[:cut], order[cut:]) if data.draw(st.booleans()) else [[name] for name in order]:
        if names:
            model.merge_adapter(names)
    assert torch.equal(bits(layer_of(model).get_base_layer().weight), expected)


@given(cases(least_adapters=2), st.data())
@some
def test_active_adapters_add_up_whatever_their_order(case, data):
    model = case.model()
    active = data.draw(st.permutations(case.names))[: data.draw(st.integers(1, len(case.names)))]
    model.base_model.set_adapter(active)
    layer = layer_of(model)
    weight, factors = oriented(case, layer.get_base_layer().weight), factors_of(model, active)
    x = case.x()
    expected = reference.linear(x, weight, layer.base_layer.bias, factors)
    # what is rounded: every product of x and W', before they are summed
    size = reference.linear(x.abs(), weight.abs(), None, [Factors(A.abs(), B.abs(), abs(s)) for A, B, s in factors])
    size += 0 if layer.base_layer.bias is None else layer.base_layer.bias.double().abs()
    unit = torch.finfo(case.dtype).eps
    assert ((model(x).double() - expected).abs() <= 4 * unit * size + torch.finfo(case.dtype).tiny).all()
    deltas = sum(layer.get_delta_weight(name).double() for name in active)
    model.merge_adapter(active)
    before = layer.unmerged_weight().double()
    merged = reference.effective_weight(before, factors)
    room = (
        4 * unit * reference.effective_weight(before.abs(), [Factors(A.abs(), B.abs(), abs(s)) for A, B, s in factors])
        + torch.finfo(case.dtype).tiny
    )
    assert ((oriented(case, layer.get_base_layer().weight).double() - merged).abs() <= room).all()
    assert ((before + oriented(case, deltas) - merged).abs() <= room).all()


@given(cases())
@some
def test_a_saved_adapter_comes_back_bit_for_bit(case):
    model = case.model()
    expected = model(case.x())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        first, *others = case.names
        loaded = PeftModel.from_pretrained(case.base(), Path(folder) / first, adapter_name=first)
        for name in others:
            loaded.load_adapter(Path(folder) / name, name)
    loaded.base_model.set_adapter(case.names)
    for before, after in zip(factors_of(model, case.names), factors_of(loaded, case.names), strict=True):
        assert torch.equal(bits(before.A), bits(after.A)) and torch.equal(bits(before.B), bits(after.B))
        assert (before.A.dtype, before.B.dtype, before.scaling) == (after.A.dtype, after.B.dtype, after.scaling)
    assert torch.equal(loaded.eval()(case.x()), expected)
    for name in case.names:
        assert loaded.base_model.relate_base(name) == {"layer": "same"}


@pytest.mark.slow
def test_the_properties_hold_for_many_more_examples():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--hypothesis-profile=thorough",
        __file__,
    ]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stdout + result.stderr
