# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from peft.helpers import disable_input_dtype_casting
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_spp import SPPConfig, SPPLayer
from peft_spp.functional import Factors

from helpers import reference
from helpers.tiny import MLP, randomize, tiny, tiny_llama


def factors_of(layer, *names):
    return [Factors(layer.spp_A[n].weight, layer.spp_B[n].weight, layer.scaling[n]) for n in names]


def spp_mlp(**settings):
    torch.manual_seed(0)
    return get_peft_model(MLP().double(), SPPConfig(**{"r": 3, "target_modules": ["lin0"], **settings}))


def test_the_fresh_adapter_is_the_identity():
    base = MLP().double()
    x = torch.randn(4, 12, dtype=torch.double)
    expected = base(x)
    assert torch.equal(get_peft_model(base, SPPConfig(r=3, target_modules=["lin0", "lin1"]))(x), expected)


def test_initial_factors():
    torch.manual_seed(0)
    layer = get_peft_model(MLP(n=400), SPPConfig(r=10, target_modules=["lin0"])).base_model.model.lin0
    A, B = layer.spp_A["default"].weight, layer.spp_B["default"].weight
    assert A.shape == (10, 400) and B.shape == (20, 1)
    assert not B.any()
    # Kaiming-uniform with a = √5 over 400 inputs: U(-1/20, 1/20)
    assert 0.0498 < A.abs().max() <= 0.05
    assert abs(A.std() - 0.05 / 3**0.5) < 1e-3


def test_a_positive_start_has_the_absolute_values_of_the_usual_draws():
    factors = []
    for init_weights in (True, "positive"):
        torch.manual_seed(0)
        layer = spp_mlp(r=4, init_weights=init_weights).base_model.model.lin0
        factors.append((layer.spp_A["default"].weight, layer.spp_B["default"].weight))
    (usual, _), (positive, B) = factors
    assert (usual < 0).any() and torch.equal(positive, usual.abs())
    assert not B.any() and positive.requires_grad and B.requires_grad


@pytest.mark.parametrize("r", [1, 3, 16, 20])
def test_layer_output_is_the_formula(r):
    model = spp_mlp(r=r, init_weights=False, spp_alpha=5)
    layer = model.base_model.model.lin0
    x = torch.randn(2, 3, 12, dtype=torch.double)
    assert layer.scaling["default"] == 5 / r
    expected = reference.linear(x, layer.get_base_layer().weight, layer.bias, factors_of(layer, "default"))
    torch.testing.assert_close(layer(x), expected)


def test_conv1d():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = Conv1D(10, 6)

        def forward(self, x):
            return self.c(x)

    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model = get_peft_model(Model().double(), SPPConfig(r=4, target_modules=["c"], init_weights=False))
    layer = model.base_model.model.c
    assert layer.spp_A["default"].weight.shape == (4, 6) and layer.spp_B["default"].weight.shape == (10, 1)
    x = torch.randn(3, 6, dtype=torch.double)
    expected = reference.linear(x, layer.get_base_layer().weight.T, layer.bias, factors_of(layer, "default"))
    torch.testing.assert_close(model(x), expected)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)


def test_small_layers_get_one_block_a_row_and_one_warning_names_them():
    with pytest.warns(UserWarning, match=r"lin1") as caught:
        model = get_peft_model(MLP(), SPPConfig(r=8, target_modules=["lin0", "lin1"]))
    assert sum("one block per row" in str(w.message) for w in caught) == 1
    assert not any("lin0" in str(w.message) for w in caught if "one block per row" in str(w.message))
    assert model.base_model.model.lin1.spp_A["default"].weight.shape == (6, 20)
    assert model.base_model.model.lin0.spp_A["default"].weight.shape == (8, 12)


def test_rank_and_alpha_pattern_hold_for_first_and_later_adapters():
    config = {"r": 4, "spp_alpha": 8, "rank_pattern": {"lin1": 2}, "alpha_pattern": {"lin1": 3}}
    model = get_peft_model(MLP(), SPPConfig(target_modules=["lin0", "lin1"], **config))
    model.add_adapter("second", SPPConfig(target_modules=["lin0", "lin1"], **config))
    for name in ("default", "second"):
        assert (model.base_model.model.lin0.r[name], model.base_model.model.lin0.scaling[name]) == (4, 2.0)
        assert (model.base_model.model.lin1.r[name], model.base_model.model.lin1.scaling[name]) == (2, 1.5)


def test_active_adapters_add_up():
    model = spp_mlp(init_weights=False)
    model.add_adapter("second", SPPConfig(r=5, target_modules=["lin0"], init_weights=False))
    model.base_model.set_adapter(["default", "second"])
    layer = model.base_model.model.lin0
    x = torch.randn(4, 12, dtype=torch.double)
    expected = reference.linear(x, layer.get_base_layer().weight, layer.bias, factors_of(layer, "default", "second"))
    torch.testing.assert_close(layer(x), expected)


def test_dropout_acts_on_the_input_of_the_spp_branch_alone():
    model = spp_mlp(init_weights=False, spp_dropout=0.5).train()
    layer = model.base_model.model.lin0
    x = torch.randn(4, 12, dtype=torch.double)
    torch.manual_seed(1)
    actual = layer(x)
    torch.manual_seed(1)
    dropped = torch.nn.functional.dropout(x, 0.5)
    expected = nn.functional.linear(x, layer.get_base_layer().weight, layer.bias) + reference.linear(
        dropped, layer.get_base_layer().weight, None, factors_of(layer, "default"), identity=False
    )
    torch.testing.assert_close(actual, expected)
    model.eval()
    torch.testing.assert_close(
        layer(x), reference.linear(x, layer.get_base_layer().weight, layer.bias, factors_of(layer, "default"))
    )


def test_gradients_with_dropout():
    model = spp_mlp(init_weights=False, spp_dropout=0.5).train()
    layer = model.base_model.model.lin0
    x = torch.randn(3, 12, dtype=torch.double, requires_grad=True)

    def f(x, A, B):
        torch.manual_seed(2)
        return layer(x)

    assert torch.autograd.gradcheck(f, (x, layer.spp_A["default"].weight, layer.spp_B["default"].weight))


def test_a_base_layer_with_its_own_forward_keeps_it():
    class Counting(nn.Linear):
        calls = 0

        def forward(self, x):
            Counting.calls += 1
            return super().forward(x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = Counting(6, 8)

        def forward(self, x):
            return self.lin(x)

    base = Model().double()
    x = torch.randn(3, 6, dtype=torch.double)
    expected = base(x)
    model = get_peft_model(base, SPPConfig(r=2, target_modules=["lin"]))
    assert torch.equal(model(x), expected)
    randomize(model)
    layer = model.base_model.model.lin
    expected = reference.linear(x, layer.get_base_layer().weight, layer.bias, factors_of(layer, "default"))
    before = Counting.calls
    torch.testing.assert_close(model(x), expected)
    assert Counting.calls == before + 1
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_hooks_of_the_base_layer_run():
    model = spp_mlp(init_weights=False)
    layer = model.base_model.model.lin0
    calls = []
    layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(3, 12, dtype=torch.double)
    expected = reference.linear(x, layer.get_base_layer().weight, layer.bias, factors_of(layer, "default"))
    torch.testing.assert_close(layer(x), expected)
    assert calls


def test_mixed_batch_gives_each_sample_its_adapter():
    model = spp_mlp(init_weights=False).eval()
    model.add_adapter("second", SPPConfig(r=5, target_modules=["lin1"], init_weights=False))
    model.base_model.model.lin1.double()
    x = torch.randn(6, 12, dtype=torch.double)
    names = ["default", "__base__", "second", "default", "second", "__base__"]
    mixed = model(x, adapter_names=names)
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = model(x[i : i + 1])
        else:
            model.set_adapter(name)
            alone = model(x[i : i + 1])
        torch.testing.assert_close(mixed[i : i + 1], alone)


def test_mixed_batch_is_refused_where_it_has_no_meaning():
    model = spp_mlp(init_weights=False)
    x = torch.randn(2, 12, dtype=torch.double)
    with pytest.raises(ValueError, match="training"):
        model.train()(x, adapter_names=["default", "default"])
    model.eval()
    with pytest.raises(ValueError, match="typo"):
        model(x, adapter_names=["default", "typo"])
    with pytest.raises(ValueError, match="3 and 2"):
        model(x, adapter_names=["default"] * 3)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model(x, adapter_names=["default"] * 2)


def test_mixed_batch_with_beam_search():
    model = get_peft_model(tiny_llama(), SPPConfig(r=4, init_weights=False)).eval()
    model.add_adapter("second", SPPConfig(r=4, init_weights=False))
    ids = torch.randint(3, 64, (2, 5))
    kwargs = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "num_beams": 2, "pad_token_id": 0}
    mixed = model.generate(input_ids=ids, adapter_names=["default", "second"], **kwargs)
    for i, name in enumerate(["default", "second"]):
        model.set_adapter(name)
        alone = model.generate(input_ids=ids[i : i + 1], **{**kwargs, "attention_mask": torch.ones(1, 5)})
        assert torch.equal(mixed[i, : alone.shape[1]], alone[0])


def test_deleting_an_adapter_leaves_nothing_behind():
    model = spp_mlp(spp_dropout=0.1)
    model.add_adapter("second", SPPConfig(r=5, target_modules=["lin0"]))
    layer = model.base_model.model.lin0
    model.delete_adapter("default")
    for attribute in (*SPPLayer.adapter_layer_names, *SPPLayer.other_param_names):
        assert set(getattr(layer, attribute)) == {"second"}


def test_names_follow_lora():
    model = spp_mlp()
    layer = model.base_model.model.lin0
    assert repr(layer).startswith("spp.Linear(")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "base_model.model.lin0.spp_A.default.weight",
        "base_model.model.lin0.spp_B.default.weight",
    }
    assert set(get_peft_model_state_dict(model)) == {
        "base_model.model.lin0.spp_A.weight",
        "base_model.model.lin0.spp_B.weight",
    }


def test_trainable_parameters_of_llama_7b():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
        model = get_peft_model(model, SPPConfig(task_type="CAUSAL_LM"))
    assert model.get_nb_trainable_parameters()[0] == 19_578_880
    assert sum(isinstance(m, SPPLayer) for m in model.modules()) == 224


def test_status():
    model = get_peft_model(tiny_llama(), SPPConfig(r=4))
    status = model.get_model_status()
    assert status.adapter_model_type == "SPPModel"
    assert status.peft_types == {"default": "SPP"}
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert status.num_adapter_layers == 21
    assert model.get_layer_status()[0].module_type == "spp.Linear"


@pytest.mark.parametrize("bias", ["none", "all", "spp_only"])
def test_bias(bias):
    model = get_peft_model(MLP(), SPPConfig(r=3, target_modules=["lin0"], bias=bias))
    trainable = {n for n, p in model.named_parameters() if p.requires_grad and "bias" in n}
    lin0, lin1 = "base_model.model.lin0.base_layer.bias", "base_model.model.lin1.bias"
    assert trainable == {"none": set(), "all": {lin0, lin1}, "spp_only": {lin0}}[bias]
    if bias != "none":
        model(torch.randn(2, 12)).sum().backward()
        assert model.get_parameter(lin0).grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapter_dtype_and_outputs(dtype):
    base = tiny_llama().to(dtype)
    model = get_peft_model(base, SPPConfig(r=4, init_weights=False))
    assert model.base_model.model.model.layers[0].mlp.up_proj.spp_A["default"].weight.dtype == torch.float32
    ids = torch.randint(0, 64, (1, 8))
    assert model(input_ids=ids).logits.dtype == dtype
    kept = get_peft_model(tiny_llama().to(dtype), SPPConfig(r=4), autocast_adapter_dtype=False)
    assert kept.base_model.model.model.layers[0].mlp.up_proj.spp_A["default"].weight.dtype == dtype


def test_float16_input_to_a_float32_layer_is_an_error_as_without_adapter():
    model = get_peft_model(MLP(), SPPConfig(r=3, target_modules=["lin0"]))
    with pytest.raises(RuntimeError, match="dtype"), disable_input_dtype_casting(model):
        model(torch.randn(2, 12, dtype=torch.float16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_share_an_input_keep_it_once_and_nothing_else(dtype):
    class Projections(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(48, size) for size in (48, 16, 16))

        def forward(self, x):
            return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)

    model = get_peft_model(Projections().to(dtype), SPPConfig(r=4, target_modules=["q", "k", "v"]))
    x = torch.randn(2, 40, 48, dtype=dtype, requires_grad=True)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = set()

    def keep(tensor):
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = model(x)
    assert kept - own == {x.untyped_storage().data_ptr()}
    y.sum().backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    def gradients(checkpointing):
        model = get_peft_model(tiny_llama(), SPPConfig(r=4))
        torch.manual_seed(1)
        randomize(model)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        ids = torch.arange(10).view(1, 10)
        model(input_ids=ids, labels=ids).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys() and plain
    for name in plain:
        torch.testing.assert_close(plain[name], checkpointed[name])


def test_encoder_decoder_runs():
    t5 = tiny("T5ForConditionalGeneration", decoder_start_token_id=0, vocab_size=64, d_model=32, d_ff=48, num_heads=4)
    model = get_peft_model(t5, SPPConfig(r=4, task_type="SEQ_2_SEQ_LM", init_weights=False))
    ids = torch.randint(0, 64, (2, 5))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
