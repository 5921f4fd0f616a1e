# SPDX-License-Identifier: Apache-2.0
import weakref

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn

from peft_spp import SPPConfig
from peft_spp.tuner.quantized import Applied, QuantizedLinear, dequantized_weight, find_backend, register_backend
from peft_spp.tuner.quantized import registry as backends

from helpers import reference
from helpers.factored import relative_error
from helpers.quantized_cases import ALL, EXACT_ZERO, IN, OUT, OneLayer, pruned_linear, quantized
from helpers.tiny import randomize


def spp_on(kind, compute_dtype=None, linear=None, **config):
    layer = quantized(kind, pruned_linear() if linear is None else linear, compute_dtype)
    model = get_peft_model(OneLayer(layer), SPPConfig(**{"r": 5, "target_modules": ["lin"], **config}))
    return model, model.base_model.model.lin


def by_formula(layer, x, adapter="default"):
    base = layer.get_base_layer()
    return reference.linear(x, dequantized_weight(base), base.bias, layer.get_factors([adapter]))


@pytest.mark.parametrize("kind", ALL)
def test_the_fresh_adapter_multiplies_by_the_dequantized_weight(kind):
    model, layer = spp_on(kind)
    assert type(layer) is QuantizedLinear
    x = torch.randn(3, IN)
    weight = dequantized_weight(layer.get_base_layer())
    assert weight.shape == (OUT, IN)
    torch.testing.assert_close(model(x), nn.functional.linear(x, weight, layer.get_base_layer().bias))
    # bitsandbytes' int8 and BitNet round the activations, too
    rounding = 0.05 if kind in ("int8", "bitnet") else 1e-6
    assert relative_error(model(x), layer.get_base_layer()(x)) < rounding


@pytest.mark.parametrize("kind", ALL)
def test_a_layer_without_zeros_is_warned_of_only_where_rounding_makes_none(kind, recwarn):
    """The zeros of a quantized weight say nothing of those before; compressed weights are not rounded."""
    linear = nn.Linear(IN, OUT)
    nn.init.constant_(linear.weight, 0.5)
    spp_on(kind, linear=linear)
    assert any("has nothing to preserve" in str(one.message) for one in recwarn) == (kind == "bitmask")


@pytest.mark.parametrize("kind", ALL)
def test_output_and_gradients_are_the_formula(kind):
    model, layer = spp_on(kind)
    model.add_adapter("second", SPPConfig(r=3, target_modules=["lin"]))
    model.base_model.set_adapter(["default", "second"])
    randomize(model)
    weight, factors = dequantized_weight(layer.get_base_layer()), layer.get_factors(["default", "second"])
    x = torch.randn(2, 7, IN, requires_grad=True)
    grad_y = torch.randn(2, 7, OUT)
    y = model(x)
    assert relative_error(y, reference.linear(x, weight, layer.get_base_layer().bias, factors)) < 1e-6
    y.backward(grad_y)
    expected = reference.gradients(x, weight, factors, grad_y)
    assert relative_error(x.grad, expected["x"]) < 1e-6
    for i, (A, B, _) in enumerate(factors):
        assert relative_error(A.grad, expected["A"][i]) < 1e-5
        assert relative_error(B.grad, expected["B"][i]) < 1e-5


@pytest.mark.parametrize("kind", ["torchao-int8", "torchao-int4"])
def test_hira_fails_on_the_tensors_of_torchao_and_spp_does_not(kind):
    x = torch.randn(3, IN)
    hira = get_peft_model(OneLayer(quantized(kind, pruned_linear())), peft.HiraConfig(r=4, target_modules=["lin"]))
    with pytest.raises(NotImplementedError, match=r"aten\.mul"):
        hira(x)
    model, layer = spp_on(kind)
    randomize(model)
    expected = by_formula(layer, x)
    assert relative_error(model(x), expected) < 1e-6


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compute_dtype_of_4_bit_layers(compute_dtype, dtype):
    model, layer = spp_on("nf4", compute_dtype, pruned_linear(dtype=dtype))
    randomize(model, 0.1)
    assert dequantized_weight(layer.get_base_layer()).dtype == dtype
    x = torch.randn(3, IN, dtype=dtype)
    expected = by_formula(layer, x)
    y = model(x)
    assert y.dtype == layer.get_base_layer()(x).dtype == dtype
    coarser = max(torch.finfo(dtype).eps, torch.finfo(compute_dtype).eps)
    assert relative_error(y, expected) < coarser
    y.sum().backward()
    assert layer.spp_A["default"].weight.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8"])
def test_autocast(kind):
    model, layer = spp_on(kind, torch.float32)
    randomize(model, 0.1)
    x = torch.randn(3, IN)
    expected = by_formula(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert relative_error(y, expected) < 1e-2


# of a compressed weight the values themselves are saved: see tests/compressed
@pytest.mark.parametrize("kind", [kind for kind in ALL if kind != "bitmask"])
def test_nothing_of_the_weights_size_is_kept_for_the_backward_pass(kind, monkeypatch):
    model, layer = spp_on(kind)
    saved, made = [], []
    dequantize = layer.backend.dequantize

    def counted(*args):
        weight = dequantize(*args)
        made.append(weakref.ref(weight))
        return weight

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    monkeypatch.setattr(layer.backend, "dequantize", counted)
    x = torch.randn(3, IN, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    # the largest is A
    assert saved and max(saved) == 5 * IN
    assert len(made) == 1 and made[0]() is None
    y.sum().backward()
    assert len(made) == 2 and made[1]() is None


def test_layers_with_one_input_share_it_until_the_backward_pass():
    model, _ = spp_on("nf4", torch.bfloat16)
    saved = []
    x = torch.randn(3, IN)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        model(x)
    assert any(tensor.data_ptr() == x.data_ptr() for tensor in saved)
    assert not any(tensor.dtype == torch.bfloat16 for tensor in saved)


@pytest.mark.parametrize("kind", ["nf4-double", "int8", "torchao-int8"])
def test_a_compiled_layer_is_one_graph_with_the_same_results(kind):
    torch._dynamo.reset()
    model, layer = spp_on(kind)
    randomize(model)
    x = torch.randn(3, IN)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for run in (model, compiled):
        model.zero_grad()
        y = run(x)
        y.sum().backward()
        results.append([y, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with torch.no_grad():
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), results[0][0])
    assert relative_error(results[0][0], by_formula(layer, x)) < 1e-6


@pytest.mark.parametrize("kind", ["nf4-double", "int8", "torchao-int8"])
def test_double_backward(kind):
    model, layer = spp_on(kind)
    randomize(model)
    x = torch.randn(3, IN, requires_grad=True)
    B = layer.spp_B["default"].weight
    (grad_x,) = torch.autograd.grad(model(x).pow(2).sum(), x, create_graph=True)
    (actual,) = torch.autograd.grad(grad_x.pow(2).sum(), B)

    A = layer.spp_A["default"].weight.detach().repeat_interleave(torch.tensor(reference.block_sizes(OUT, 5)), 0)
    base = layer.get_base_layer()
    effective = dequantized_weight(base) * (1 + layer.scaling["default"] * A * B)
    (grad_x,) = torch.autograd.grad((x @ effective.T + base.bias).pow(2).sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(grad_x.pow(2).sum(), B)
    assert relative_error(actual, expected) < 1e-4


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8", "torchao-int4", "hqq"])
def test_dropout_mixed_batch_and_disabled_adapter(kind):
    model, layer = spp_on(kind, spp_dropout=0.5)
    model.add_adapter("second", SPPConfig(r=3, target_modules=["lin"]))
    randomize(model)
    base, weight = layer.get_base_layer(), dequantized_weight(layer.get_base_layer())
    x = torch.randn(4, IN)
    with torch.no_grad():
        with model.disable_adapter():
            assert torch.equal(model(x), base(x))
        model.train()
        torch.manual_seed(1)
        actual = model(x)
        torch.manual_seed(1)
        dropped = nn.functional.dropout(x, 0.5)
        update = reference.linear(dropped, weight, None, layer.get_factors(["default"]), identity=False)
        assert relative_error(actual, base(x) + update) < 1e-6
        model.eval()
        names = ["default", "__base__", "second", "default"]
        mixed = model(x, adapter_names=names)
        for i, name in enumerate(names):
            one = x[i : i + 1]
            expected = base(one) if name == "__base__" else by_formula(layer, one, name)
            assert relative_error(mixed[i : i + 1], expected) < (0.02 if kind == "int8" else 1e-5)


@pytest.mark.parametrize(
    ("kind", "least", "most"),
    [
        ("nf4", 0.07, 0.10),
        ("nf4-double", 0.07, 0.10),
        ("fp4", 0.0, 0.02),
        ("int8", 0.005, 0.02),
        ("torchao-int8", 0.005, 0.02),
        ("torchao-int4", 0.10, 0.13),
    ],
)
def test_how_many_weights_quantizing_makes_zero(kind, least, most):
    linear = nn.Linear(512, 256, bias=False)
    torch.manual_seed(0)
    linear.weight.data.normal_()
    linear.weight.data[torch.rand(256, 512) < 0.5] = 0.0
    before = linear.weight.detach().clone()
    after = dequantized_weight(quantized(kind, linear))
    assert not after[before == 0].any()
    assert least <= (after[before != 0] == 0).double().mean() <= most


@pytest.mark.parametrize("kind", EXACT_ZERO)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), sparsity=st.floats(0, 1), scale=st.floats(-3, 3), empty_rows=st.integers(0, 8))
def test_quantizing_keeps_zeros(kind, seed, sparsity, scale, empty_rows):
    torch.manual_seed(seed)
    linear = nn.Linear(IN, 16, bias=False)
    linear.weight.data.normal_().mul_(10.0**scale)
    linear.weight.data[torch.rand(16, IN) < sparsity] = 0.0
    linear.weight.data[:empty_rows] = 0.0
    zero = linear.weight.detach() == 0
    after = dequantized_weight(quantized(kind, linear))
    assert torch.isfinite(after).all()
    assert not after[zero].any()


def test_hqq_loses_zeros():
    linear = pruned_linear()
    zero = linear.weight.detach() == 0
    assert (dequantized_weight(quantized("hqq", linear))[zero] != 0).double().mean() > 0.9


def test_the_layout_of_the_cpu_kernel_is_read():
    layer = quantized("nf4", pruned_linear()).eval()
    before = dequantized_weight(layer)
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    layer.weight.data, _ = _convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    after = dequantized_weight(layer)
    assert after.dtype == before.dtype
    # its scales are bfloat16
    torch.testing.assert_close(after, before, rtol=2**-8, atol=0)
    assert torch.equal(after == 0, before == 0)


def test_a_4_bit_layer_that_is_not_quantized_yet_is_read():
    bnb = pytest.importorskip("bitsandbytes")
    for layer in (bnb.nn.Linear4bit(IN, OUT), bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False)):
        expected = layer.weight.data.clone()
        assert torch.equal(dequantized_weight(layer), expected)


def test_a_subclass_with_its_own_forward_keeps_it():
    bnb = pytest.importorskip("bitsandbytes")

    class Doubling(bnb.nn.Linear4bit):
        def forward(self, x):
            return 2 * super().forward(x)

    model = OneLayer(Doubling(IN, OUT, compute_dtype=torch.float32)).to("cpu")
    x = torch.randn(3, IN)
    expected = model(x)
    model = get_peft_model(model, SPPConfig(r=4, target_modules=["lin"]))
    assert torch.equal(model(x), expected)


def test_a_weight_of_unknown_quantization_is_refused_by_name():
    linear = nn.Linear(IN, OUT)
    linear.weight = nn.Parameter(torch.zeros(OUT, IN, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"lin.*torch\.nn\.modules\.linear\.Linear.*int8.*register_backend"):
        get_peft_model(OneLayer(linear), SPPConfig(target_modules=["lin"]))


def test_a_tensor_type_that_no_backend_knows_is_refused_by_name():
    torchao = pytest.importorskip("torchao.quantization")
    linear = pruned_linear()
    linear.weight = nn.Parameter(torchao.to_nf4(linear.weight.detach(), 64, 64), requires_grad=False)
    assert linear.weight.dtype == torch.float32
    with pytest.raises(ValueError, match=r"lin.*NF4Tensor.*register_backend"):
        get_peft_model(OneLayer(linear), SPPConfig(target_modules=["lin"]))


class _Codes(nn.Module):
    """A layer of a package that nobody knows."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = IN, OUT, linear.bias
        self.register_buffer("scale", linear.weight.detach().abs().max() / 127)
        self.register_buffer("codes", (linear.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x):
        return nn.functional.linear(x, self.codes * self.scale, self.bias)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(backends, "_backends", list(backends._backends))
    register_backend(Applied(__name__))


def test_a_layer_of_an_unknown_package_is_refused_until_it_is_registered():
    model = OneLayer(_Codes(pruned_linear()))
    with pytest.raises(ValueError, match=r"lin.*_Codes.*register_backend"):
        get_peft_model(model, SPPConfig(target_modules=["lin"]))
    assert type(model.lin) is _Codes


def test_a_registered_package_is_read_by_what_its_layers_do(registered):
    layer = _Codes(pruned_linear())
    weight = layer.codes * layer.scale
    assert isinstance(find_backend(layer), Applied)
    torch.testing.assert_close(dequantized_weight(layer), weight, rtol=0, atol=1e-7)
    assert torch.equal(dequantized_weight(layer) == 0, weight == 0)


def test_a_layer_that_is_no_linear_map_is_refused(registered):
    class Normed(_Codes):
        def forward(self, x):
            return super().forward(nn.functional.layer_norm(x, (IN,)))

    with pytest.raises(ValueError, match=r"lin.*Normed"):
        get_peft_model(OneLayer(Normed(pruned_linear())), SPPConfig(target_modules=["lin"]))
