# SPDX-License-Identifier: Apache-2.0
"""`peft_spp.compress` and `peft_spp.decompress` on what is loaded already."""

import copy
import warnings

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import peft_spp
from peft_spp import CompressedLinear, SPPConfig
from peft_spp.inference.semi_structured import choose_layers
from peft_spp.pruning import prune_magnitude
from peft_spp.sparsity import compare_sparsity, sparsity_report

from helpers.compressed_cases import IDS, pruned_llama, same_bits, same_tensors, tensors_of
from helpers.tiny import MLP, block_linears, prune_, tiny


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@given(
    m=st.integers(1, 40),
    n=st.integers(1, 140),
    density=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    dtype=st.sampled_from(list(TOLERANCE)),
    bias=st.booleans(),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_any_linear_layer_comes_back_bit_for_bit(m, n, density, dtype, bias, seed):
    torch.manual_seed(seed)
    layer = nn.Linear(n, m, bias=bias).to(dtype)
    with torch.no_grad():
        layer.weight[torch.rand(m, n) >= density] = 0.0
        layer.weight.view(-1)[: m * n // 3 : 2] *= -1  # some are -0.0 now
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compressed = peft_spp.compress(copy.deepcopy(layer), min_sparsity=0.0)
    assert isinstance(compressed, CompressedLinear)
    x = torch.randn(3, n, dtype=dtype)
    torch.testing.assert_close(compressed(x), layer(x), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    back = peft_spp.decompress(compressed)
    assert type(back) is nn.Linear
    assert same_tensors(back.state_dict(), layer.state_dict())


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_logits_loss_and_gradients_are_the_dense_models(dtype):
    model = pruned_llama(dtype)
    compressed = peft_spp.compress(copy.deepcopy(model))
    for one in (model, compressed):
        for name, parameter in one.named_parameters():
            parameter.requires_grad_("norm" in name or "embed" in name)
    results = [one(input_ids=IDS, labels=IDS) for one in (model, compressed)]
    for result in results:
        result.loss.backward()
    tolerance = {"rtol": 4 * TOLERANCE[dtype], "atol": 4 * TOLERANCE[dtype]}
    torch.testing.assert_close(results[1].logits, results[0].logits, **tolerance)
    torch.testing.assert_close(results[1].loss, results[0].loss, **tolerance)
    gradients = [{k: p.grad for k, p in one.named_parameters() if p.grad is not None} for one in (model, compressed)]
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == 8
    for name, expected in gradients[0].items():
        off = (gradients[1][name].double() - expected.double()).norm() / expected.double().norm()
        assert off < 4 * TOLERANCE[dtype], name


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_greedy_tokens_are_the_dense_models(settings):
    model = pruned_llama()
    compressed = peft_spp.compress(copy.deepcopy(model))
    arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **settings}
    assert torch.equal(compressed.generate(IDS, **arguments), model.generate(IDS, **arguments))


def test_a_compressed_model_in_memory_is_saved_compressed(tmp_path):
    model = pruned_llama()
    expected = copy.deepcopy(model)
    assert peft_spp.compress(model) is model
    assert type(model.lm_head) is nn.Linear
    assert model.is_quantized
    model.save_pretrained(tmp_path / "compressed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "compressed")
    assert sum(isinstance(layer, CompressedLinear) for layer in loaded.modules()) == 21
    assert peft_spp.decompress(model) is model
    assert not model.is_quantized
    assert same_tensors(model.state_dict(), expected.state_dict())
    assert same_tensors(loaded.dequantize().state_dict(), expected.state_dict())
    model.save_pretrained(tmp_path / "dense")
    assert same_tensors(tensors_of(tmp_path / "dense"), expected.state_dict())


def test_a_model_of_transformers_inside_another_module_keeps_its_head_dense(tmp_path):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = pruned_llama()
            self.extra = nn.Linear(64, 8)
            prune_(self.extra.weight, "0.5")

    wrapper = Wrapper()
    prune_(wrapper.inner.lm_head.weight, "0.5")
    expected = copy.deepcopy(wrapper)
    peft_spp.compress(wrapper)
    assert isinstance(wrapper.extra, CompressedLinear)
    assert type(wrapper.inner.lm_head) is nn.Linear
    wrapper.inner.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same_tensors(loaded.dequantize().state_dict(), expected.inner.state_dict())
    assert same_tensors(peft_spp.decompress(wrapper).state_dict(), expected.state_dict())


def test_what_is_more_than_a_linear_layer_stays_as_it_is():
    class Special(nn.Linear):
        pass

    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.special, self.own = Special(8, 8), Own(8, 8)
            self.hooked, self.double = nn.Linear(8, 8), nn.Linear(8, 8).double()
            self.shared = nn.Linear(8, 8)
            self.shared_again = self.shared
            self.tied, self.tied_to = nn.Linear(8, 8), nn.Linear(8, 8)
            self.tied_to.weight = self.tied.weight
            self.masked, self.plain = nn.Linear(8, 8), nn.Linear(8, 8)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))

    model = Model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[: len(parameter) // 2] = 0.0
    torch.nn.utils.prune.random_unstructured(model.masked, "weight", 0.5)
    model.hooked.register_forward_hook(lambda module, inputs, output: output * 2)
    before = dict(model.named_modules())
    with pytest.warns(UserWarning, match="layers stay dense") as told:
        peft_spp.compress(model)
    changed = {name for name, module in model.named_modules() if before[name] is not module}
    assert changed == {"plain"}
    text = str(told[0].message)
    for name in ("special", "own", "hooked", "double", "masked", "normed"):
        assert f"{name} (" in text
    assert "shared" not in text


def test_training_mode_bias_and_what_is_frozen():
    model = MLP().train()
    for layer in (model.lin0, model.lin1):
        prune_(layer.weight, "0.5")
    bias = model.lin0.bias
    peft_spp.compress(model)
    assert model.lin0.training
    assert model.lin0.bias is bias
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [
        "lin0.bias",
        "lin1.bias",
    ]
    peft_spp.decompress(model)
    assert model.lin0.bias is bias
    assert model.lin0.weight.requires_grad


@pytest.mark.parametrize("config", [None, LoraConfig(), SPPConfig(r=4)])
def test_values_that_are_to_be_trained_are_refused(config):
    model = peft_spp.compress(pruned_llama())
    if config is not None:
        model = get_peft_model(model, config)
    model.requires_grad_(True)
    with pytest.raises(ValueError, match=r"a compressed weight is frozen.*peft_spp\.decompress"):
        model(input_ids=IDS, labels=IDS)
    with torch.no_grad():
        model(input_ids=IDS, labels=IDS)
    if not isinstance(config, SPPConfig):
        peft_spp.decompress(model)(input_ids=IDS, labels=IDS).loss.backward()


def test_compressing_twice_changes_nothing():
    model = peft_spp.compress(pruned_llama())
    layers = dict(model.named_modules())
    values = {name: one.clone() for name, one in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_spp.compress(model)
    assert dict(model.named_modules()) == layers
    assert same_tensors(model.state_dict(), values)


@pytest.mark.parametrize(
    ("function", "config"),
    [(peft_spp.compress, LoraConfig), (peft_spp.compress, SPPConfig), (peft_spp.decompress, SPPConfig)],
)
def test_a_model_with_adapters_is_refused(function, config):
    base = pruned_llama() if function is peft_spp.compress else peft_spp.compress(pruned_llama())
    model = get_peft_model(base, config(task_type="CAUSAL_LM"))
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj has an adapter"):
        function(model)
    assert dict(model.named_modules()) == before


def test_a_model_without_data_is_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="0 has no data"):
        peft_spp.compress(model)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_loads_into_a_layer_with_other_places(assign):
    layers = []
    for share in ("0.3", "0.7"):
        layer = nn.Linear(70, 9)
        prune_(layer.weight, share)
        layers.append(peft_spp.compress(layer))
    layers[0].load_state_dict(layers[1].state_dict(), assign=assign)
    assert same_bits(layers[0].dequantize(), layers[1].dequantize())
    assert torch.equal(layers[0].row_offsets, layers[1].row_offsets)


def test_block_linears_are_what_is_compressed():
    model = pruned_llama()
    names = block_linears(model).keys()
    peft_spp.compress(model)
    assert {name for name, layer in model.named_modules() if isinstance(layer, CompressedLinear)} == names


@pytest.mark.parametrize(
    ("make", "read", "called"),
    [
        (lambda: nn.TransformerEncoderLayer(16, 2, 32), ["linear1", "linear2"], []),
        (
            lambda: (
                tiny("FalconMambaForCausalLM", hidden_size=16, num_hidden_layers=1, state_size=4, vocab_size=32)
                .backbone.layers[0]
                .mixer
            ),
            ["dt_proj"],
            ["in_proj"],
        ),
    ],
)
def test_layers_whose_weight_is_read_by_the_module_around_them_stay_dense(make, read, called):
    module = make()
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            prune_(layer.weight, "0.75")
    with pytest.warns(UserWarning, match="its weight is read without calling it"):
        peft_spp.compress(module)
    assert not any(isinstance(module.get_submodule(name), CompressedLinear) for name in read)
    assert all(isinstance(module.get_submodule(name), CompressedLinear) for name in called)


def test_reports_read_compressed_layers_in_memory():
    model = pruned_llama(pattern="2:4")
    dense = copy.deepcopy(model)
    peft_spp.compress(model)
    reports = [sparsity_report(one) for one in (dense, model)]
    assert len(reports[1]) == 21
    assert [vars(one) for one in reports[0]] == [vars(one) for one in reports[1]]
    assert compare_sparsity(dense, model).kept
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.up_proj").weight[:7] = 0.0
    comparison = compare_sparsity(dense, model)
    assert comparison.kept
    assert comparison["model.layers.0.mlp.up_proj"].gained == 7 - 1  # one of them is a -0.0


def test_pruning_and_packing_say_that_it_is_compressed():
    model = peft_spp.compress(pruned_llama())
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj is compressed"):
        prune_magnitude(model, sparsity=0.7)
    _, skipped = choose_layers(model)
    assert "compressed" in skipped["model.layers.0.self_attn.q_proj"]


def with_compressed_head(adapted: bool = False) -> nn.Module:
    model = pruned_llama()
    prune_(model.lm_head.weight, "0.5")
    peft_spp.compress(model, modules_to_not_convert=["layers"])
    return get_peft_model(model, SPPConfig(target_modules=["lm_head"])).base_model.model if adapted else model


@pytest.mark.parametrize("adapted", [False, True], ids=["alone", "adapted"])
@pytest.mark.parametrize("arguments", [{"new_num_tokens": 70}, {"pad_to_multiple_of": 48}], ids=str)
def test_a_vocabulary_with_a_compressed_head_is_not_half_resized(arguments, adapted):
    model = with_compressed_head(adapted)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"since lm_head is compressed.*peft_spp\.decompress.*modules_to_not_convert"):
        model.resize_token_embeddings(**arguments)
    assert same_tensors(model.state_dict(), before)
    assert model.config.vocab_size == 64


def test_a_vocabulary_with_a_compressed_head_that_fits_or_is_made_dense_is_resized():
    model = with_compressed_head()
    assert model.resize_token_embeddings() is model.resize_token_embeddings(64, pad_to_multiple_of=32)
    assert isinstance(model.lm_head, CompressedLinear)
    model = peft_spp.decompress(model)
    model.resize_token_embeddings(70)
    assert model.lm_head.weight.shape == (70, 32) == model.get_input_embeddings().weight.shape
    model = peft_spp.compress(pruned_llama())
    model.resize_token_embeddings(70)
    assert model(IDS).logits.shape == (*IDS.shape, 70)


def test_quantizing_compressed_layers_is_refused_before_they_change():
    torchao = pytest.importorskip("torchao.quantization")
    model = peft_spp.compress(pruned_llama())
    expected = model(IDS).logits
    with pytest.raises(ValueError, match=r"CompressedLinear\(in_features=32.*Int8Tensor.*peft_spp\.decompress"):
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    assert torch.equal(model(IDS).logits, expected)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), filter_fn=lambda module, name: name == "lm_head")
    assert 0 < (model(IDS).logits - expected).abs().max() < 0.05 * expected.abs().max()


def _dataset():
    return [{"input_ids": IDS[0], "labels": IDS[0]} for _ in range(4)]


@pytest.mark.parametrize("config", [LoraConfig(task_type="CAUSAL_LM"), SPPConfig(task_type="CAUSAL_LM", r=4)], ids=str)
def test_a_trainer_trains_adapters_and_refuses_the_model_alone(tmp_path, config):
    arguments = TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, max_steps=2, save_strategy="no", learning_rate=0.05, seed=1
    )
    losses = []
    for prepare in (lambda model: model, peft_spp.compress):
        torch.manual_seed(0)
        model = get_peft_model(prepare(pruned_llama()), config)
        trainer = Trainer(model, arguments, train_dataset=_dataset())
        trainer.train()
        losses.append(trainer.state.log_history[-1]["train_loss"])
        final = model(input_ids=IDS, labels=IDS).loss.item()
        losses.append(final)
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-5)
    assert losses[1] < losses[0]
    with pytest.raises(ValueError, match="adapters"):
        Trainer(peft_spp.compress(pruned_llama()), arguments, train_dataset=_dataset())


def test_it_compiles_without_graph_breaks():
    model = pruned_llama()
    expected = model(IDS).logits
    compiled = torch.compile(peft_spp.compress(model), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS).logits, expected, rtol=1e-5, atol=1e-5)
